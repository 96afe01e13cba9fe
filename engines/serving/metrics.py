"""What a server counts, in Prometheus' text format.

Labels come from the models that are served, never from a request: a client cannot make new time series.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from prometheus_client.metrics import MetricWrapperBase

    from engines.serving.model import Model

Kind = TypeVar("Kind", bound="MetricWrapperBase")

REASONS = (
    "malformed", "unknown_model", "too_large", "queue_full", "connections", "loading", "withdrawn", "stopping",
    "deadline", "disconnected", "failed",
)  # fmt: skip
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        model = ("model", "version")

        def made(kind: type[Kind], name: str, text: str, labels: Sequence[str] = model) -> Kind:
            metric: Kind = kind(f"nxm_{name}", text, labels, registry=self.registry)
            return metric

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"nxm_{name}", text, model, registry=self.registry, buckets=buckets)

        self._requests = made(Counter, "requests", "Inference requests answered, by HTTP status.", (*model, "code"))
        self._rejected = made(Counter, "rejected", "Inference requests not answered with a result.", (*model, "reason"))
        self._queue = histogram("queue_seconds", "Time that a request waited for its batch.", _SECONDS)
        self._request = histogram("request_seconds", "Time from the first byte of a request to its answer.", _SECONDS)
        self._compute = histogram("compute_seconds", "Time of a batch in the engine.", _SECONDS)
        self._rows = histogram("batch_rows", "Rows of requests in a batch.", _ROWS)
        self._padding = histogram("batch_padding_ratio", "Share of a batch's tokens that is padding.", _SHARES)
        self._waiting = made(Gauge, "queue_rows", "Rows waiting now.")
        self._engine = made(Gauge, "engine_info", "The engine that answers now.", (*model, "backend", "sha256"))
        self._reloads = made(
            Counter, "reloads", "Changed engine directories, by what came of them.", (*model, "result")
        )
        self.connections = made(Gauge, "connections", "Open connections.", ())
        self.ready = made(Gauge, "ready", "1 when every model is ready and the server is not draining.", ())
        for reason in REASONS:
            self._rejected.labels("", "", reason)

    def watch(self, model: Model) -> Observation:
        """The counters of a model that begins to serve."""
        key = (model.name, model.version)
        for labels in [s.labels for m in self._engine.collect() for s in m.samples]:
            if (labels["model"], labels["version"]) == key:
                self._engine.remove(*key, labels["backend"], labels["sha256"])
        self._engine.labels(*key, model.passport.backend, model.passport.engine_sha256).set(1)
        self._waiting.labels(*key).set_function(lambda: model.queue.rows)
        return Observation(self, key)

    def reloaded(self, model: Model, result: str) -> None:
        """Count a reload: ``done`` or ``refused``."""
        self._reloads.labels(model.name, model.version, result).inc()

    def rejected(self, model: Model | None, reason: str) -> None:
        """Count a request that gets an error, by one of `REASONS`."""
        self._rejected.labels(*(("", "") if model is None else (model.name, model.version)), reason).inc()

    def answered(self, model: Model | None, code: int) -> None:
        """Count an answer."""
        self._requests.labels(*(("", "") if model is None else (model.name, model.version)), str(code)).inc()

    def text(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class Observation:
    """One model's histograms, with the labels resolved once. An `engines.serving.batching.Observer`."""

    def __init__(self, metrics: Metrics, key: tuple[str, str]) -> None:
        self._queue = metrics._queue.labels(*key)
        self._request = metrics._request.labels(*key)
        self._compute = metrics._compute.labels(*key)
        self._rows = metrics._rows.labels(*key)
        self._padding = metrics._padding.labels(*key)
        self._ok = metrics._requests.labels(*key, "200")

    def batch(self, rows: int, padding: float, seconds: float, waits: Sequence[float]) -> None:
        """Count a batch."""
        self._rows.observe(rows)
        self._padding.observe(padding)
        self._compute.observe(seconds)
        for wait in waits:
            self._queue.observe(wait)

    def answer(self, seconds: float) -> None:
        """Count a request that got its result."""
        self._request.observe(seconds)
        self._ok.inc()
