"""What a search is asked: candidate specs, budget, and how many samples it may spend. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nxm_export.contract.choices import PLACEMENT, STORAGE, STORAGES
from nxm_export.contract.options import OPTION, Option, options_of
from nxm_export.contract.plan import COUNTINGS, PLACEMENTS
from nxm_export.contract.records.latency_table import LatencySource
from nxm_export.errors import DataError, PlanError

DEFAULT_CANDIDATES = ("2:4+W4", "W4", "2:4+W8", "W8", "dense")
METHODS = ("nxm", "paper")
MIN_SAMPLES, MAX_SAMPLES = 8, 256  # calibration samples, and samples that judge
# Held-out samples for one that calibrates: by as few as that many, swaps pick what fits these samples, and make a plan
# worse on others (docs/research-notes.md).
JUDGES = 4
_JUDGING = 0.5  # forward passes of a sample that judges, in training's precision: .4 in bfloat16, 1 in float32
# Together they made a search cost 9 to 10 % of a compression run while as many samples judged as calibrate, in float32:
# a training sample costs 1.1 to 1.2 forward passes of the search where training is bfloat16 and the search float32
# (AVX-512 CPUs, `nxm search` on CoLA, rotten tomatoes and MRPC), about four where both are float32.
COST_SHARE = 0.055
_TRAINING_PASSES = 2
MIXES = 11  # weights of the two sensitivities that candidates are made for


@dataclass(frozen=True)
class SearchSettings:
    """What to search for, and how long.

    The budget is `compression` (1 - compressed/FP32 over the planned weights) by `counting`, or `bytes` by the same
    counting. `latency_ms`, with `latencies`, adds a second constraint: milliseconds per (role, option), from the
    `latency_source`, where it is known. `pareto` are
    further compressions to report from the same table, `halving` the optimizer steps of each round of short runs, after
    which the better half of the finalists stays. `samples` to calibrate on and samples to be held out and judge are
    chosen so that the search takes about a tenth of a compression run, where they are not given (see `passes`).
    `embedding` is that of every plan: the table is no part of what is searched, and the one-shot scores leave it in
    float.
    """

    candidate_specs: tuple[str, ...] = field(
        default=DEFAULT_CANDIDATES,
        metadata={OPTION: Option("Options per weight, separated by commas.", flag="--candidates")},
    )
    compression: float | None = field(default=0.875, metadata={OPTION: Option("1 - compressed/FP32 of the weights.")})
    bytes: int | None = field(
        default=None, metadata={OPTION: Option("Budget in bytes instead of --compression.", least=1)}
    )
    counting: str = field(
        default="hw", metadata={OPTION: Option("How the budget is counted.", flag="--count", choices=tuple(COUNTINGS))}
    )
    method: str = field(default="nxm", metadata={OPTION: Option(choices=METHODS)})
    placement: str = field(default=PLACEMENT, metadata={OPTION: Option(choices=tuple(PLACEMENTS))})
    embedding: str = field(
        default=STORAGE,
        metadata={
            OPTION: Option("How every plan stores the word-embedding table; no budget counts it.", choices=STORAGES)
        },
    )
    samples: int | None = field(
        default=None,
        metadata={
            OPTION: Option(
                "Calibration samples.  [default: 16 to 256, for a tenth of a compression run's time]", least=1
            )
        },
    )
    held_out: int | None = field(
        default=None,
        metadata={
            OPTION: Option(f"Samples of train that judge.  [default: {JUDGES} times as many, at most 256]", least=1)
        },
    )
    swaps: int = field(default=40, metadata={OPTION: Option(least=0)})
    halving: tuple[int, ...] = field(
        default=(),
        metadata={OPTION: Option("Optimizer steps of each round of short runs.  [default: none]", metavar="STEPS,...")},
    )
    finalists: int = field(default=4, metadata={OPTION: Option(least=1)})
    pareto: tuple[float, ...] = field(
        default=(), metadata={OPTION: Option("Further compressions to report from the same table.", metavar="C,...")}
    )
    latency_ms: float | None = field(
        default=None, metadata={OPTION: Option("Limit on the sum of the table's milliseconds.", above=0)}
    )
    seed: int = field(default=0, metadata={OPTION: Option(least=0, most=2**32 - 1)})
    # No options from here on.
    batch_size: int = 8  # so few samples differ too much in length for larger ones: padding would cost a fifth
    latencies: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    latency_source: LatencySource | None = None

    def __post_init__(self) -> None:
        for name, entry in options_of(self):
            entry.require(name, getattr(self, name))
        if (self.compression is None) == (self.bytes is None):
            raise PlanError("give either a compression or a number of bytes")
        for compression in (*self.pareto, *([] if self.compression is None else [self.compression])):
            if not 0 < compression < 1:
                raise PlanError(f"compression is a share between 0 and 1, as in 0.875; got {compression}")
        for count in (self.samples, self.held_out):
            if count is not None and count < MIN_SAMPLES:
                raise DataError(
                    f"the search needs at least {MIN_SAMPLES} calibration and {MIN_SAMPLES} held-out samples, got "
                    f"{count}"
                )
        if any(steps < 1 for steps in self.halving):
            raise PlanError("a round of short runs (--halving) has at least 1 step")
        if (self.latency_ms is None) == bool(self.latencies):
            raise PlanError("a latency limit and a latency table go together (--latency-ms, --latency-table)")
        if self.pareto and self.method == "paper":
            raise PlanError("the paper's search has no table to take further compressions from; drop --pareto")

    @property
    def compressing(self) -> int:
        """How many of the candidates change a weight."""
        return sum(option.strip().lower() != "dense" for option in self.candidate_specs)

    def passes(self, blocks: int, matrices: int) -> float:
        """Forward passes that the search takes per calibration sample, with the `JUDGES` held-out ones, for a model of
        that many blocks with that many matrices each."""
        table = matrices * self.compressing * (blocks + 1) / 2 + blocks  # an entry of block b runs the blocks from b on
        joint = MIXES + 2 * 3 + self.swaps
        return table + JUDGES * _JUDGING * joint * (1 + len(self.pareto) / 2)

    def sized(self, blocks: int, matrices: int, available: int, trained: int, solving: float = 0.0) -> SearchSettings:
        """These settings with both numbers of samples, for a model of `blocks` with that many `matrices` each,
        `available` samples and a run that trains on `trained` in all; `solving` the weights takes as long as that many
        forward passes of a sample, whatever the number of samples.

        The paper's enumeration costs what it costs, and gets as many samples as allowed.
        """
        count = MAX_SAMPLES
        if self.method == "nxm":
            count = min(count, int((COST_SHARE * trained * _TRAINING_PASSES - solving) / self.passes(blocks, matrices)))
        count = max(2 * MIN_SAMPLES, count)
        few = max(MIN_SAMPLES, available // 4)
        samples = self.samples or max(MIN_SAMPLES, min(count, few, available - (self.held_out or 0)))
        judging = max(MIN_SAMPLES, min(MAX_SAMPLES, JUDGES * samples, few, available - samples))
        return replace(self, samples=samples, held_out=self.held_out or judging)
