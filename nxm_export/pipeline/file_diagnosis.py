"""`nxm doctor` on a file: which matrices of an ONNX file could run sparse on a GPU, judged without building it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.contract.choices import COMPUTE_CAPABILITY
from nxm_export.pipeline.graph_file import onnx_file
from nxm_export.storage.json_files import to_builtins

if TYPE_CHECKING:
    from engines.sparsity.advice import Advice
    from engines.sparsity.sparsity_report import SparsityReport
    from engines.tensorrt.rtx_parser import ParserAnswer


@dataclass(frozen=True)
class FileDiagnosis:
    """Any ONNX file, judged without building it: which of its matrices can run sparse, what to do about the others, and
    what is wrong with it: what `nxm verify` finds, what TensorRT's parser refuses or misreads, and, where it was asked,
    what an installed parser says (`parsed`). A file with problems has no matrix that is ready."""

    file: str
    sparsity: SparsityReport
    advice: tuple[Advice, ...]
    problems: tuple[str, ...]
    parsed: ParserAnswer | None = None

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        advice, problems, parsed = to_builtins(self.advice), list(self.problems), to_builtins(self.parsed)
        return {"file": self.file, **self.sparsity.to_dict(), "advice": advice, "problems": problems, "parsed": parsed}


def diagnose_file(
    file: Path,
    backend_name: str,
    version: str | None = None,
    gpu: str = COMPUTE_CAPABILITY,
    *,
    parse: bool = False,
) -> FileDiagnosis:
    """The matrices of any ONNX file (or the one in a graph directory), judged for a TensorRT version and GPU without
    building, and advice for each.

    `version` and `gpu` are as people write them; `EngineError` for what is not understood. `parse` asks the parser of
    the installed TensorRT-RTX, too: `EngineUnavailable` where there is none. What it takes is not ready for that.
    """
    from engines.sparsity.advice import advise
    from engines.sparsity.judgement import FileProblem, judge
    from engines.sparsity.targets import sparsity_target, target_problems
    from engines.tensorrt.rtx_parser import ask_parser
    from nxm_export.graph.reading.graph_weights import load_graph
    from nxm_export.graph.reading.sparsity_scan import scan_and_verify
    from nxm_export.graph.tensorrt_parser import parser_of, parser_problems

    target = sparsity_target(backend_name, version, gpu)
    file = onnx_file(file)
    model = load_graph(file)
    scanned, checked = scan_and_verify(model, str(file))
    answer = ask_parser(file) if parse else None
    problems = [FileProblem(problem, weight.name) for weight in checked.weights for problem in weight.problems]
    problems += map(FileProblem, checked.problems)
    problems += [
        FileProblem(str(problem)) for problem in parser_problems(model, parser_of(backend_name, target.version))
    ]
    problems += target_problems(target)
    if answer is not None:
        problems += [FileProblem(f"{error} ({answer.parser}'s parser refuses it)") for error in answer.errors]
    report = replace(judge(scanned.facts, None, target, problems=problems), unread=scanned.unread)
    advice = tuple(advise(scanned.facts, report, problems))
    return FileDiagnosis(str(file), report, advice, tuple(map(str, problems)), answer)
