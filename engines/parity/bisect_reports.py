"""What a bisection leaves behind: ``bisect.json``, and who reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nxm_export.errors import ParityError
from nxm_export.storage.json_files import as_objects, read_record, to_json_object

SCHEMA = "nxm-bisect/2"
BISECT_FILE = "bisect.json"
_WAY_OUT = "run `nxm compare --bisect` again"


@dataclass(frozen=True)
class BlockParity:
    """What an engine has behind one block, against PyTorch, over all real tokens.

    The ``accumulated_`` numbers are of the error as it has grown through all blocks so far; the ``isolated_`` ones are
    of this block given the engine's own input, and decide. Steps are in the unit of
    `engines.parity.tolerance.OutputParity`, at this boundary, and None where no quantizer acts. A number that NaN or
    infinity leaves without a value is None, too. `passed` is None for a block whose input was not finite already.
    """

    block: str
    accumulated_max_abs: float | None
    accumulated_mean_abs: float | None
    accumulated_max_tolerance: float | None
    accumulated_steps: float | None
    isolated_max_abs: float | None
    isolated_mean_abs: float | None
    isolated_steps: float | None
    isolated_max_tolerance: float | None
    isolated_mean_tolerance: float | None
    isolated_unchanged_share: float
    isolated_unchanged_required: float
    passed: bool | None
    reason: str


@dataclass(frozen=True)
class BisectReport:
    """All blocks of an engine, in the order in which they run, the head last; `first_diverging` is the first that
    failed. `passed` says that there are blocks, that none of them is one, and that they speak for the engine.

    `kernels` are the operators of which the engine with block outputs runs another number than the engine itself
    (engine, with block outputs), None where that cannot be told; `outputs_equal` says whether both give the same
    outputs, bit for bit. Where either differs, the engine with block outputs is not quite the engine.
    `outputs_problem` says by how much their outputs differ where that is more than rounding does: then the blocks say
    nothing of the engine. It is None where it is not, and in reports of older versions.
    """

    passed: bool
    engine: str
    engine_sha256: str
    backend: str
    samples: int
    tokens: int
    first_diverging: str | None
    kernels_changed: bool | None
    kernels: Mapping[str, tuple[int, int]] | None
    outputs_equal: bool
    blocks: tuple[BlockParity, ...]
    reason: str
    outputs_problem: str | None = None

    def __post_init__(self) -> None:
        first = first_diverging(self.blocks)
        passed = first is None and len(self.blocks) > 0 and self.outputs_problem is None
        if (self.passed, self.first_diverging) != (passed, first):
            raise ValueError("`passed` and `first_diverging` are not what its blocks and outputs say")

    def require(self) -> None:
        """Raise `ParityError` unless `passed`."""
        if not self.blocks:
            raise ParityError(f"{self.engine}: no block of it was compared; build it again from a new export")
        for block in self.blocks:
            if block.block == self.first_diverging:
                raise ParityError(f"{self.engine}: it parts from the checkpoint in {block.block}: {block.reason}")
        if self.outputs_problem is not None:
            raise ParityError(
                f"{self.engine}: its blocks were looked at in a copy with more outputs, which is not the engine: "
                f"{self.outputs_problem}. `nxm compare` without --bisect judges the engine itself"
            )

    def to_dict(self) -> dict[str, object]:
        """The form of ``bisect.json`` and ``--json``."""
        return {"schema": SCHEMA, **to_json_object(self)}


def first_diverging(blocks: Sequence[BlockParity]) -> str | None:
    """The first block that failed."""
    return next((block.block for block in blocks if block.passed is False), None)


def read_bisect_report(file: Path) -> BisectReport:
    """The report in a ``bisect.json`` of this version or the one before; raises `ArtifactError` by file and field."""
    return read_record(file, BisectReport, schema=SCHEMA, way_out=_WAY_OUT, older={"nxm-bisect/1": _from_1})


_BLOCK_1 = {
    "max_abs": "accumulated_max_abs",
    "mean_abs": "accumulated_mean_abs",
    "max_tolerance": "accumulated_max_tolerance",
    "steps": "accumulated_steps",
    "own_max_abs": "isolated_max_abs",
    "own_mean_abs": "isolated_mean_abs",
    "own_steps": "isolated_steps",
    "own_max_tolerance": "isolated_max_tolerance",
    "own_mean_tolerance": "isolated_mean_tolerance",
    "own_quiet": "isolated_unchanged_share",
    "own_quiet_required": "isolated_unchanged_required",
}


def _from_1(fields: dict[str, object]) -> dict[str, object]:
    """A file of nxm-bisect/1 had other words."""
    blocks = [{_BLOCK_1.get(key, key): value for key, value in block.items()} for block in as_objects(fields["blocks"])]
    return {**fields, "blocks": blocks}
