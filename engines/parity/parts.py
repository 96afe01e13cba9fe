"""One side of a comparison: an engine directory with the reference it is held against, and its outputs for samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.admission import require_unchanged
from engines.base import Engine, backend
from engines.devices import running_on, runtime_here
from engines.memory import engine_memory
from engines.parity.compatibility import plan_of, require_from
from engines.parity.probes import longest_sequence
from engines.parity.reports import OUTPUTS_FILE, PARITY_FILE, NotCompared, ParityReport, report_text
from engines.parity.tolerance import (
    DTYPE_ROUNDING,
    QUANTIZER_ROUNDING,
)
from engines.passport import EnginePassport, covered_spec, load_passport
from engines.reference import pytorch
from engines.reference.pytorch import Perturbation
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.plan import CompressionPlan
from nxm_export.contract.tasks import TASKS
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS, MAX_ROWS
from nxm_export.data.features import Features, filled, pad, sorted_batches
from nxm_export.errors import EngineError, EngineUnavailable, NxmError
from nxm_export.storage.atomic import write_atomic


@dataclass(frozen=True)
class Part:
    """An engine directory that belongs to the checkpoint it is compared with; `plan` is that of its graph, None for
    dense."""

    directory: Path
    passport: EnginePassport
    spec: IOSpec
    plan: CompressionPlan | None

    @property
    def graph_dtype(self) -> str:
        """Float type of its graph, which its scales are rounded to."""
        return str(self.passport.graph.get("dtype", "float32"))

    @property
    def dtype(self) -> str:
        """Float type that it may compute in: its graph's; float16 where the builder was free to choose it, layer by
        layer, for a float32 graph (weakly typed TensorRT)."""
        free = self.graph_dtype == "float32" and self.passport.options.get("strongly_typed") is False
        return "float16" if free else self.graph_dtype

    @property
    def key(self) -> str:
        """Engines with the same key have the same reference, and the same samples for the probes against it."""
        longest = longest_sequence(self.spec, self.passport.profiles)
        return f"{self.dtype} {self.graph_dtype} {self.passport.graph['placement']} {longest} {self.rounding}"

    @property
    def rounding(self) -> float:
        """The relative error by which the reference is made to round as this engine does: that of its float type, or of
        its backend's quantizer."""
        of_quantizer = QUANTIZER_ROUNDING.get(self.passport.backend, 0.0) if self.plan else 0.0
        return max(DTYPE_ROUNDING[self.dtype], of_quantizer)

    @property
    def rounding_noise(self) -> Perturbation:
        """`rounding` where this engine rounds: in a shorter float type behind every operator, in float32 where its
        quantizers read."""
        return Perturbation(self.rounding, everywhere=DTYPE_ROUNDING[self.dtype] > 0.0)

    @property
    def rounding_text(self) -> str:
        """`rounding` in words."""
        backend_rounds = self.passport.backend in QUANTIZER_ROUNDING
        return f"{self.dtype} as {self.passport.backend} rounds" if backend_rounds else self.dtype

    def load_reference(
        self,
        checkpoint: Path,
        *,
        exact: bool = False,
        perturbation: Perturbation = Perturbation(),
    ) -> pytorch.TorchEngine:
        """Its checkpoint in PyTorch, in one of the arithmetics that `engines.reference.pytorch.load` describes."""
        return pytorch.load(
            checkpoint,
            task=self.spec.task,
            scale_dtype=self.graph_dtype,
            plan=self.plan,
            exact=exact,
            perturbation=perturbation,
        )

    def memory(self, batch: int, sequence: int) -> int:
        """Bytes of this machine's memory that the engine needs at least for a batch; 0 where that is on its GPU."""
        shape = (batch, sequence)
        needed = engine_memory(self.directory, self.passport, [shape])
        return 0 if needed is None else needed[shape] + (self.directory / self.passport.engine).stat().st_size

    def load(self) -> Engine:
        """The engine itself; raises `ServeError` where another one has come into its directory: a report names the hash
        of the one that was opened."""
        engine = backend(self.passport.backend).load(self.directory)
        try:
            require_unchanged(self.directory, self.passport)
        except NxmError:
            engine.close()
            raise
        return engine

    def without_report(self, error: EngineError) -> NotCompared:
        """What is said of this engine in place of a report: that it cannot run here, or failed. Where it failed, the
        report beside it says so from now on, whatever it said before."""
        failed = not isinstance(error, EngineUnavailable)
        if failed:
            write_atomic(self.directory / PARITY_FILE, report_text(self._failure(error)))
            (self.directory / OUTPUTS_FILE).unlink(missing_ok=True)
        return NotCompared(
            str(self.directory), self.passport.engine_sha256, self.passport.backend, str(error), failed=failed
        )

    def _failure(self, error: EngineError) -> ParityReport:
        return ParityReport(
            passed=False,
            engine=str(self.directory),
            engine_sha256=self.passport.engine_sha256,
            backend=self.passport.backend,
            samples=0,
            outputs=(),
            metric=TASKS[self.spec.task].metric,
            reference_value=None,
            reference_interval=None,
            engine_value=None,
            engine_interval=None,
            reason="",
            difference=None,
            difference_interval=None,
            probes=(),
            gates=(),
            pairs=(),
            secondary_metrics={},
            contents_sha256=self.passport.contents_sha256,
            machine=running_on(self.passport),
            runtime=runtime_here(self.passport),
            failure=str(error),
        )


def loadable(parts: Sequence[Part]) -> tuple[list[Part], list[NotCompared]]:
    """(engines that load here, the others); raises like `require_some` where none does, and of one alone its error."""
    loaded, others = [], []
    for part in parts:
        try:
            with part.load():
                loaded.append(part)
        except EngineError as error:
            others.append(part.without_report(error))
            if len(parts) == 1:
                raise
    require_some(loaded, others)
    return loaded, others


def require_some(compared: Sequence[object], others: Sequence[NotCompared]) -> None:
    """Raise `EngineUnavailable` with the reasons of the others where nothing was compared; `EngineError` where one of
    them failed."""
    if not compared:
        kind = EngineError if any(engine.failed for engine in others) else EngineUnavailable
        reasons = "; ".join(f"{engine.engine}: {engine.reason}" for engine in others)
        raise kind(f"nothing could be compared here: {reasons}")


def open_part(checkpoint: Path, directory: Path) -> Part:
    """An engine directory, checked against its checkpoint; raises `ArtifactError`."""
    passport = load_passport(directory)
    spec = covered_spec(directory, passport)
    plan = plan_of(checkpoint, directory, passport)
    require_from(checkpoint, directory, passport, spec)
    return Part(directory, passport, spec, plan)


def run_all(
    engine: Engine,
    features: Sequence[Features],
    spec: IOSpec,
    batch_size: int = MAX_ROWS,
    batch_tokens: int = MAX_BATCH_TOKENS,
) -> dict[str, np.ndarray]:
    """Outputs of every sample, in the order of `features`; batches are by length, so that little is padding, and of at
    most so many rows and tokens.

    Outputs with a row for every token are (samples, longest sequence, ...), 0 for padding.
    """
    rows: dict[str, dict[int, np.ndarray]] = {name: {} for name in engine.outputs}
    for indices in sorted_batches(features, batch_size, batch_tokens):
        outputs = engine.run(pad([features[i] for i in indices], spec.pad_id))
        for name, values in outputs.items():
            for i, value in zip(indices, values, strict=True):
                rows[name][i] = value[: len(features[i]["input_ids"])] if per_token(spec, name) else value
    return {name: filled([values[i] for i in range(len(features))], 0.0) for name, values in rows.items()}


def per_token(spec: IOSpec, name: str) -> bool:
    """Whether an output has a row for every token."""
    return "sequence" in spec.outputs.get(name, ())
