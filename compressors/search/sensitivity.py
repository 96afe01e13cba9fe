"""How much each (weight, option) hurts on its own: the table that the search decides from.

Two measures, both with the weight compressed as the recipe would make it before training
(`compressors.pruning.layerwise.DRAFTS`) and its input quantized, everything else dense:

``kl``      divergence of the model's outputs from the dense model's on calibration samples;
``fisher``  ``sum_o f_o (w_o - z_o)^T E[x x^T] (w_o - z_o)`` with f_o the mean squared gradient of the loss at output o:
            the second-order estimate of the loss, without a forward pass per entry.

Memory does not depend on the number of samples, and holds the second moments of one block, or of several that together
are small (`compressors.search.one_shot`): statistics are streamed, and for each encoder block the samples pass in
chunks through the blocks before it twice, and through the rest once per entry. Finished blocks are kept on disk, so an
interrupted table goes on where it was. Under ``torchrun`` each process measures some of the blocks.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from compressors import distributed
from compressors.search.one_shot import OneShot, Options
from compressors.search.probe import Batches, SensitivityProbe
from compressors.training.output_divergence import divergence
from nxm_export.errors import ArtifactError, DataError
from nxm_export.storage.atomic import make_directory, write_atomic

COLUMNS = ("weight", "option", "kl", "fisher")
_LEAST = -1e-9  # no divergence is negative but by rounding


@dataclass(frozen=True)
class Sensitivity:
    """One row of the table."""

    weight: str
    option: str
    kl: float
    fisher: float


def measure(
    probe: SensitivityProbe,
    batches: Batches,
    one_shot: OneShot,
    options: Options,
    directory: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Sensitivity]:
    """The table of all weights and their options, in that order.

    Every process adds what it measures, block by block, to a file of its own in `directory`, which is to belong to this
    model, these samples and these options; what the files hold already is not measured again.
    """
    if not any(len(batch["input_ids"]) for batch in batches):
        raise DataError("the calibration set is empty")
    earlier = {file: read_sensitivities(file) for file in sorted(directory.glob(_part_name("*")))}
    distributed.wait()  # everyone has read the parts before anyone goes on writing one
    known = {(entry.weight, entry.option): entry for part in earlier.values() for entry in part}
    missing = []
    for block in range(len(probe.blocks)):
        weights = [weight for weight in probe.weights if weight.startswith(f"{probe.blocks[block]}.")]
        if any((weight, str(option)) not in known for weight in weights for option in options[weight]):
            missing.append((block, weights))
    own_file = directory / _part_name(str(distributed.rank()))
    own, new = list(earlier.get(own_file, [])), list[Sensitivity]()
    done = len(probe.blocks) - len(missing)
    for number, (block, weights) in enumerate(missing[distributed.rank() :: distributed.world_size()]):
        new += _measure_block(probe, batches, one_shot, {weight: options[weight] for weight in weights}, block)
        write_sensitivities(own_file, own + new)
        progress(min(done + (number + 1) * distributed.world_size(), len(probe.blocks)), len(probe.blocks))
    one_shot.share()
    known |= {(entry.weight, entry.option): entry for entry in distributed.gathered(new)}
    return [known[weight, str(option)] for weight in probe.weights for option in options[weight]]


def _part_name(rank: str) -> str:
    return f"sensitivity-{rank}.csv"


def _measure_block(
    probe: SensitivityProbe, batches: Batches, one_shot: OneShot, options: Options, block: int
) -> list[Sensitivity]:
    pairs = [(weight, option) for weight, specs in options.items() for option in specs]
    totals = [0.0] * len(pairs)
    start = 0 if probe.repeats else block
    for batch in batches:
        hidden, reference = probe.hidden_before(batch, start) if start else (None, probe.outputs(batch))
        for number, (weight, option) in enumerate(pairs):
            with probe.installed({weight: one_shot(weight, option)}):
                totals[number] += divergence(reference, probe.outputs(batch, start, hidden), probe.output_kind)
    samples = sum(len(batch["input_ids"]) for batch in batches)
    entries = []
    for (weight, option), total in zip(pairs, totals, strict=True):
        fisher = float(one_shot.candidate(weight, option).errors @ one_shot.statistics[weight].fisher.double())
        kl = total / samples
        if not (math.isfinite(kl) and math.isfinite(fisher)):
            raise DataError(
                f"{weight} under {option}: its sensitivity is {kl if not math.isfinite(kl) else fisher}; the "
                "model overflows on "
                "the calibration samples: leave it out of the candidate specs, or check the model"
            )
        entries.append(Sensitivity(weight, str(option), kl, fisher))
    return entries


def write_sensitivities(file: Path, table: Iterable[Sensitivity]) -> None:
    """Write the table as CSV, old or new, never half; raises `ArtifactError` where the disk is full."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([entry.weight, entry.option, repr(entry.kl), repr(entry.fisher)] for entry in table)
    make_directory(file.parent)
    write_atomic(file, text.getvalue())


def read_sensitivities(file: Path) -> list[Sensitivity]:
    """Read a table; raises `ArtifactError` when it is none, torn, or holds what no measurement gives."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            text = stream.read()
        reader = csv.DictReader(text.splitlines())
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"columns {reader.fieldnames}")
        if not text.endswith("\n"):
            raise ValueError("its last line is torn")
        table = [Sensitivity(row["weight"], row["option"], float(row["kl"]), float(row["fisher"])) for row in reader]
        for entry in table:
            if not all(math.isfinite(value) and value > _LEAST for value in (entry.kl, entry.fisher)):
                raise ValueError(f"{entry.weight} under {entry.option}: kl {entry.kl}, fisher {entry.fisher}")
        return table
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{file}: not a sensitivity table ({error}); delete it to measure again") from error
