"""One sentence over the verdicts, and the command that serves the engine that it is about.

No engine is called ready that was not compared, failed, or whose files contradict each other: then there is no command,
and the reason stands in its place.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from nxm_export.reporting.engine_facts import EngineEntry
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.tables import Code
from nxm_export.reporting.verdicts import (
    ABSENT,
    BAD,
    DENSE_NOT_SHOWN,
    GOOD,
    NO_DIFFERENCE,
    OPEN,
    Piece,
    Verdict,
    compression,
    dev_samples,
    main_engine,
    metric,
    planned_sparse,
    proved_sparse,
    ratios,
    verdicts,
)


@dataclass(frozen=True)
class Conclusion:
    """`pieces` are the sentence, `command` serves the engine that it is about; without one, `no_command` says why."""

    state: str
    pieces: tuple[Piece | Code, ...]
    command: str | None = None
    no_command: str = ""


Clause = tuple[Piece | Code, ...]


def conclude(run: Run) -> Conclusion:
    """What a run shows, in one sentence."""
    if run.doubts:
        sentence = (
            "Do not trust the numbers of this page yet: files of the run contradict each other or cannot be read."
        )
        return Conclusion(BAD, (sentence,), no_command="An engine is served when its files agree.")
    engine = main_engine(run)
    if engine is None:
        sentence = "This run is not finished: it has no compressed engine yet."
        return Conclusion(OPEN, (sentence,), no_command="There is no engine to serve.")
    answers = {verdict.key: verdict for verdict in verdicts(run)}
    clauses = [
        _parity(engine),
        _accuracy(run, answers["accuracy"]),
        _speed(run, engine, answers["speed"]),
        _size(run),
        _sparse(run, answers["sparse"]),
    ]
    pieces: list[Piece | Code] = []
    for number, clause in enumerate(clauses):
        pieces += [*(["; "] if number else []), *clause]
    reason = _why_not_served(engine, answers)
    command = None if reason else shlex.join(["nxm", "serve", str(run.root / "engines" / engine.name)])
    return Conclusion(_state(answers), (*pieces, "."), command, reason)


def _state(answers: dict[str, Verdict]) -> str:
    """The worst of all; no difference in accuracy is as good as it gets for most runs, and the sentence says so."""
    states = [GOOD if v.key == "accuracy" and v.word == NO_DIFFERENCE else v.state for v in answers.values()]
    if BAD in states:
        return BAD
    return OPEN if OPEN in states or ABSENT in states else GOOD


def _why_not_served(engine: EngineEntry, answers: dict[str, Verdict]) -> str:
    if engine.failed_by:
        return f"{engine.name} failed the comparison with its checkpoint ({engine.failed_by}): do not serve it."
    if engine.parity is None:
        return f"{engine.name} was not compared with its checkpoint: compare it before you serve it."
    if answers["sparse"].state == BAD:
        return "A stored matrix breaks the pattern of its plan: do not serve it."
    if engine.bytes is None:
        return f"The file of {engine.name} is not in this run."
    return ""


def _parity(engine: EngineEntry) -> Clause:
    name: Clause = (Code(engine.name),)
    if engine.passport is not None:
        name = (*name, f" (backend {engine.passport.content.backend})")
    if engine.failed_by:
        return (*name, " failed the comparison with its checkpoint (", Code(engine.failed_by), ")")
    if engine.parity is None:
        return (*name, " was not compared with its checkpoint")
    return (*name, " computes what its checkpoint computes, within the measured tolerance")


def _accuracy(run: Run, verdict: Verdict) -> Clause:
    if verdict.state == ABSENT:
        return (f"its {metric(run)} was not compared with the dense model's",)
    low, high = run.figure("difference_interval", 0), run.figure("difference_interval", 1)
    if low is None or high is None or low.number is None or high.number is None:
        return (f"its difference in {metric(run)} to the dense model has no interval, so nothing is said of it",)
    if verdict.word.startswith(DENSE_NOT_SHOWN):
        return (
            f"the dense model is not shown to be better than {verdict.word.removeprefix(DENSE_NOT_SHOWN)} for every "
            "sample, so nothing is shown to be kept",
        )
    words = {
        BAD: f"its {metric(run)} is worse than the dense model's",
        GOOD: f"its {metric(run)} is better than the dense model's",
        OPEN: f"no difference in {metric(run)} to the dense model was found",
    }
    samples = dev_samples(run)
    on: Clause = (" on ", samples.shown("general"), " samples") if samples else ()
    return (words[verdict.state], *on, " (95 % interval ", low.shown("signed"), " to ", high.shown("signed"), ")")


def _speed(run: Run, engine: EngineEntry, verdict: Verdict) -> Clause:
    if verdict.state == ABSENT:
        return ("its speed was not measured",)
    measured = sorted(ratios(run, engine.name), key=lambda ratio: ratio.speedup.number or 0.0)
    least, most = measured[0], measured[-1]
    of = f" of the speed of {least.reference}"
    span: Clause = (" (", least.speedup.shown("ratio"), "x")
    if measured[1:]:
        span = (*span, " to ", most.speedup.shown("ratio"), "x")
    if verdict.word == NO_DIFFERENCE:
        return ("no difference in speed was found", *span, of, ")")
    return (f"it is {verdict.word}", *span, of, ")")


def _size(run: Run) -> Clause:
    hw = compression(run, "hw")
    if hw is None or hw.number is None:
        return ("its size is not known",)
    if hw.number <= 0:
        return ("its matrices take no fewer bits than in FP32",)
    return ("its matrices take ", hw.shown("share"), " fewer bits than in FP32")


def _sparse(run: Run, verdict: Verdict) -> Clause:
    if verdict.state == BAD:
        return ("a stored matrix breaks the pattern of its plan",)
    if verdict.word in ("no plan", "not planned"):
        return ("no matrix is planned to be sparse",)
    best = max(run.engines, key=lambda engine: proved_sparse(engine)[0])
    proved, planned = proved_sparse(best)
    if not proved:
        return ("no engine of this run proves that sparse kernels run",)
    of = max(planned, len(planned_sparse(run)[0]))  # an engine may have a fused matrix in parts
    return (Code(best.name), f" runs {proved} of {of} sparse matrices on sparse kernels")
