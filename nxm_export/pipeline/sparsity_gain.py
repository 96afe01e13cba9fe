"""Will 2:4 pay? For a model's directory, of which ``config.json`` is enough, or for any ONNX file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.contract.checkpoint import read_config_file
from nxm_export.contract.choices import TENSORRT_BACKENDS
from nxm_export.contract.encoder_family import INSIDE
from nxm_export.contract.families import FAMILIES, family_of
from nxm_export.errors import ArtifactError, EngineError
from nxm_export.pipeline.graph_file import is_graph_directory, onnx_file

if TYPE_CHECKING:
    from engines.sparsity.gain_report import GainReport
    from engines.sparsity.workload import Workload

GAIN_SHAPE = (32, 128)
_MOST_TOKENS = 2**31
_GRAPH_FORMS = ("matmul", "gemm", "conv1x1")


def is_model_directory(path: Path) -> bool:
    """True for a Hugging Face directory that is no graph directory."""
    return (path / "config.json").is_file() and not is_graph_directory(path)


def expected_gain(
    path: str | Path,
    gpu: str,
    shape: tuple[int, int] = GAIN_SHAPE,
    *,
    backend: str = TENSORRT_BACKENDS[0],
    version: str | None = None,
) -> GainReport:
    """What 2:4 can gain over dense INT8 for a model or graph on `gpu` (a name, or ``cpu``), at a (batch, sequence).

    Raises `EngineError` for a GPU, version or shape that cannot be, `ArtifactError` for what is no model or graph.
    """
    from engines.sparsity.gain_report import gain_report
    from engines.sparsity.workload import encoder_workload

    path, (batch, sequence) = Path(path), shape
    if batch < 1 or sequence < 1:
        raise EngineError(f"{batch}x{sequence} is not a shape; give batch x sequence, both at least 1")
    if batch * sequence > _MOST_TOKENS:
        raise EngineError(
            f"{batch}x{sequence} are more than {_MOST_TOKENS} tokens, which no GPU holds; give a smaller shape"
        )
    if path.is_dir() and not is_model_directory(path) and not is_graph_directory(path):
        raise ArtifactError(f"{path} has no config.json and no graph; give the directory of a model, or an ONNX file")
    if is_model_directory(path):
        config = read_config_file(path)
        family = family_of(config, source=str(path / "config.json"))
        work = encoder_workload(family, config, batch, sequence)
        inside = any(linear.writes == INSIDE for linear in family.linears)  # no quantizer comes before the activation
        gelu = family.gelu(config)
        epilogue = f"gelu_{gelu}" if inside and gelu else "none"
        return gain_report(str(path), work, gpu, backend, version, epilogue=epilogue)
    return gain_report(str(path), _graph_workload(onnx_file(path), batch, sequence), gpu, backend, version)


def _graph_workload(file: Path, batch: int, sequence: int) -> Workload:
    """The pass of a graph with a plan, as of its model; of another one the products with weights, each over all tokens:
    it does not say what is around them."""
    from engines.sparsity.workload import WeightProduct, Workload, planned_workload
    from nxm_export.graph.reading.graph_weights import load_graph
    from nxm_export.graph.reading.sparsity_scan import scan_products
    from nxm_export.graph.verifier import embedded_plan

    model = load_graph(file)
    scanned, plan = scan_products(model, str(file)), embedded_plan(model, str(file))
    if plan is not None and plan.model_type in FAMILIES:
        uses = Counter(fact.name for fact in scanned.facts)
        work = planned_workload(FAMILIES[plan.model_type], plan.shapes, uses, batch, sequence)
        if work is not None:
            return work
    counted = [fact for fact in scanned.facts if fact.form in _GRAPH_FORMS and fact.k and fact.n]
    left_out = len(scanned.facts) + len(scanned.unread) - len(counted)
    if not counted:
        raise ArtifactError(
            f"{file}: no matrix product with a weight was read, so there is nothing to count; `nxm doctor {file}` says "
            "what is in it"
        )
    notes = [
        "every product is taken to run over all tokens, and nothing else is counted; the model's directory says more"
    ]
    if left_out:
        notes.append(f"{left_out} products are not counted: they were not read, or are no plain matrix products")
    alike = Counter((fact.name or fact.node, fact.k, fact.n) for fact in counted)
    products = tuple(WeightProduct(name, k, n, runs, 1) for (name, k, n), runs in alike.items())
    return Workload(batch, sequence, products, None, tuple(notes))
