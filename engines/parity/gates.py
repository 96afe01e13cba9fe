"""Gates that a user sets on a comparison, such as ``drop<=0.5``, beside the derived tolerance, which always holds.

* ``drop<=0.5``: the task metric of the engine is at most 0.5 points (hundredths) below that of its checkpoint in
  PyTorch.
* ``drop(mcc)<=0.5``: the same of another metric of the task, here Matthews correlation.
* ``flips<=0.5%``: at most that share of the decisions changes: of the classes of samples or tokens, of the labels of
  all samples where each has several, of the starts or ends of answers.
* ``max_abs<=0.1``: no value of any output differs by more.
* ``cosine>=0.99``: no sample's embedding has a lower cosine with the checkpoint's.
* ``embedding_table<=0.5``: what rounding the embedding table to INT8 cost, in points. The checkpoint has the rounded
  table, so no comparison with it can tell; ``nxm compress`` measured it on its dev data, with all else equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nxm_export.contract.records.checkpoint_metrics import METRICS_FILE, CompressionMetrics, read_metrics
from nxm_export.errors import DataError, EngineError

QUANTITIES = {
    "drop": "points of the task metric below the checkpoint's",
    "flips": "% of the decisions (a sample's class, a token's, each label of several) that are others",
    "max_abs": "largest |difference| of any output",
    "cosine": "lowest cosine of a sample's embedding with the checkpoint's",
    "embedding_table": "points of the task metric that rounding the embedding table cost, on `nxm compress`'s dev data",
}
LEAST = ("cosine",)  # the more the better: a gate says at least
_FORM = re.compile(r"\s*(\w+)(?:\((\w+)\))?\s*([<>]=)\s*([0-9.eE+-]+)\s*(%?)\s*")


@dataclass(frozen=True)
class Gate:
    """``quantity <= limit`` (of `LEAST`: ``>=``); drop and embedding_table are in metric points, flips in percent,
    max_abs in the output's own unit."""

    quantity: str
    limit: float
    metric: str | None = None  # of a drop; None: the task's own

    @property
    def key(self) -> str:
        """What it is about."""
        return f"{self.quantity}({self.metric})" if self.metric else self.quantity

    def __str__(self) -> str:
        sign = ">=" if self.quantity in LEAST else "<="
        return f"{self.key}{sign}{self.limit:g}{'%' if self.quantity == 'flips' else ''}"


@dataclass(frozen=True)
class GateResult:
    """What a gate measured, in the unit of its limit; None where NaN or infinity leave nothing to measure, which
    fails."""

    gate: str
    actual: float | None
    limit: float
    passed: bool
    reason: str


def parse_gate(text: str) -> Gate:
    """Read a gate as the command line has it; raises `EngineError` with the forms that there are."""
    match = _FORM.fullmatch(text)
    if match is None or match[1] not in QUANTITIES or (match[2] and match[1] != "drop"):
        raise EngineError(
            f"{text!r} is not a gate; write drop<=0.5 (metric points; of another metric drop(mcc)<=0.5), flips<=0.5%, "
            "max_abs<=0.1, cosine>=0.99 or embedding_table<=0.5"
        )
    quantity, metric, sign, number, percent = match.groups()
    if (sign == ">=") != (quantity in LEAST):
        raise EngineError(
            f"{text!r}: this gate has the form {quantity}{'>=' if quantity in LEAST else '<='}{number}{percent}"
        )
    try:
        limit = float(number)
    except ValueError as error:
        raise EngineError(f"{text!r}: {number!r} is not a number") from error
    if not (math.isfinite(limit) and limit >= 0.0):
        raise EngineError(f"{text!r}: a limit is a finite number from 0 on")
    if bool(percent) != (quantity == "flips"):  # a bare flips<=0.5 could be a half of all samples
        unit = {
            "flips": "a share in percent: flips<=0.5%",
            "drop": "metric points: drop<=0.5",
            "embedding_table": "metric points: embedding_table<=0.5",
            "cosine": "a number: cosine>=0.99",
        }
        raise EngineError(f"{text!r}: write {unit.get(quantity, 'the difference itself: max_abs<=0.1')}")
    if quantity == "cosine" and limit > 1.0:
        raise EngineError(f"{text!r}: no cosine is above 1")
    if percent and limit > 100.0:
        raise EngineError(f"{text!r}: more than all samples cannot flip")
    return Gate(quantity, limit, metric)


def embedding_table_drop(checkpoint: Path) -> float:
    """Points that a checkpoint's INT8 embedding table cost, from its ``metrics.json``; `DataError` where it does not
    say."""
    metrics = read_metrics(checkpoint) if (checkpoint / METRICS_FILE).is_file() else None
    drop = metrics.embedding_table_drop if isinstance(metrics, CompressionMetrics) else None
    if drop is None:
        raise DataError(
            "a gate on embedding_table needs a checkpoint that `nxm compress --embedding int8` made, and "
            f"{checkpoint} has no embedding_table_drop in "
            "its metrics.json; drop the gate, or compress with it"
        )
    return drop


def check_gate(gate: Gate, quantities: Mapping[str, float]) -> GateResult:
    """Hold a gate against the measured `quantities`; NaN passes no gate."""
    value, least = quantities[gate.key], gate.quantity in LEAST
    asked = f"at {'least' if least else 'most'} {gate.limit:g}"
    if not math.isfinite(value):
        reason = f"{QUANTITIES[gate.quantity]}: not a number (the outputs hold NaN or infinity?); {asked} is asked"
        return GateResult(str(gate), None, gate.limit, False, reason)
    # A drop of 0.5 points is a difference of two means: it may come out a rounding error above the limit that it is
    # equal to.
    slack = 1e-9 * max(1.0, abs(gate.limit))
    passed = bool(value >= gate.limit - slack if least else value <= gate.limit + slack)
    return GateResult(str(gate), value, gate.limit, passed, f"{QUANTITIES[gate.quantity]}: {value:.4g}, {asked}")
