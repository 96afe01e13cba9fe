"""What Triton's clients ask for beside an inference: a model's statistics and its configuration, in Triton's words.

``perf_analyzer`` needs both: the configuration for the rows of a batch, the statistics for where the time went. Numbers
that there are none of here (caches, memory) are left out or zero, as Triton does without them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.serving.batching import Observer
    from engines.serving.model import Endpoint, Model

_BACKENDS = {"ort": "onnxruntime", "trt": "tensorrt"}  # in Triton's words
_TYPES = {"INT64": "TYPE_INT64", "FP32": "TYPE_FP32", "BYTES": "TYPE_STRING"}


@dataclass
class Duration:
    """How often something happened, and how long it took in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count it `count` more times, which took `seconds` in all."""
        self.count += count
        self.seconds += seconds

    def to_dict(self) -> dict[str, object]:
        """Triton's form."""
        return {"count": self.count, "ns": round(1e9 * self.seconds)}


class EngineStatistics:
    """The batches of one engine, for all names that it is served under. An `engines.serving.batching.Observer` that
    tells another one, too; called by the engine's threads."""

    def __init__(self, also: Observer) -> None:
        self._also = also
        self._lock = threading.Lock()
        self._queue = Duration()
        self._compute: dict[int, Duration] = {}  # by rows of a batch
        self._requests = 0

    def batch(self, rows: int, padding: float, seconds: float, waits: Sequence[float]) -> None:
        """Count a batch."""
        self._also.batch(rows, padding, seconds, waits)
        with self._lock:
            self._queue.add(sum(waits), len(waits))
            self._compute.setdefault(rows, Duration()).add(seconds)
            self._requests += len(waits)

    def to_dict(self, answers: AnswerStatistics) -> dict[str, object]:
        """Triton's form, for the name that gave these `answers`."""
        with self._lock:
            compute = sorted((rows, d.count, d.seconds) for rows, d in self._compute.items())
            queue, requests = self._queue.to_dict(), self._requests
        none = Duration().to_dict()
        infer = Duration(requests, sum(seconds for _, _, seconds in compute))
        around = Duration(
            requests
        ).to_dict()  # not timed apart; perf_analyzer ends itself unless all three counts agree
        return {
            "last_inference": round(1e3 * answers.last),
            "inference_count": answers.rows,
            "execution_count": sum(count for _, count, _ in compute),
            "inference_stats": {
                "success": answers.success.to_dict(),
                "fail": answers.fail.to_dict(),
                "queue": queue,
                "compute_input": around,
                "compute_infer": infer.to_dict(),
                "compute_output": around,
                "cache_hit": none,
                "cache_miss": none,
            },
            "response_stats": {},
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": Duration(count).to_dict(),
                    "compute_infer": Duration(count, seconds).to_dict(),
                    "compute_output": Duration(count).to_dict(),
                }
                for rows, count, seconds in compute
            ],
            "memory_usage": [],
        }


@dataclass
class AnswerStatistics:
    """The answers under one name; changed on the event loop alone. `last` is in seconds since 1970."""

    rows: int = 0
    last: float = 0.0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)

    def answered(self, rows: int, seconds: float) -> None:
        """Count a result of so many rows."""
        self.rows += rows
        self.last = time.time()
        self.success.add(seconds)


def model_config(endpoint: Endpoint) -> dict[str, object]:
    """What ``/config`` answers: how this server runs the model. Dims are without the batch."""
    model: Model = endpoint.model
    return {
        "name": endpoint.name,
        "platform": model.platform,
        "backend": _BACKENDS.get(model.passport.backend, model.passport.backend),
        "version_policy": {"all": {}},
        "max_batch_size": model.buckets.most,
        "input": [
            {
                "name": spec.name,
                "data_type": _TYPES[spec.datatype],
                "dims": list(spec.shape[1:]),
                "optional": spec.optional,
            }
            for spec in endpoint.inputs
        ],
        "output": [
            {"name": spec.name, "data_type": _TYPES[spec.datatype], "dims": list(spec.shape[1:])}
            for spec in endpoint.outputs
        ],
        "dynamic_batching": {"max_queue_delay_microseconds": round(1e6 * model.queue.max_delay)},
        "model_transaction_policy": {"decoupled": False},
    }
