"""The models that answer: loaded when the server starts, replaced when their directories change, withdrawn when their
parity is no longer good enough, and closed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from engines.admission import gate_state
from engines.serving.batching import QueuedRequest
from engines.serving.metrics import Metrics, Observation
from engines.serving.model import Model
from engines.serving.repository import Change, Repository
from engines.serving.statistics import EngineStatistics
from nxm_export.errors import NxmError
from nxm_export.storage.unreadable import is_without_room

log = logging.getLogger("nxm.serve")


class LiveModels:
    """A repository's models while an event loop runs. `watch`: seconds between looks at their directories (0: none).

    `failure` says why they could not be loaded; then `give_up` is called.
    """

    def __init__(self, repository: Repository, metrics: Metrics, *, watch: float) -> None:
        self.failure: Exception | None = None
        self.give_up: Callable[[], None] = lambda: None
        self.observations: dict[Model, Observation] = {}
        self.statistics: dict[Model, EngineStatistics] = {}
        self._repository = repository
        self._metrics = metrics
        self._watch = watch
        self._loading = ThreadPoolExecutor(1, "load")

    async def run(self) -> None:
        """Load the models and start them, then watch their directories, until cancelled."""
        began = time.monotonic()
        try:
            await asyncio.get_running_loop().run_in_executor(self._loading, self._repository.open)
        except Exception as error:  # whoever runs the server raises it again
            self.failure = error
            self.give_up()
            return
        for model in self._repository.models:
            self._begin(model)
            log.info("loaded", extra={"facts": _facts_of(model)})
        log.info("ready", extra={"facts": {"seconds": round(time.monotonic() - began, 3)}})
        await self._reload_changed()

    async def close(self) -> None:
        """Close all models; requests that are running are answered first."""
        await asyncio.get_running_loop().run_in_executor(self._loading, self._repository.close)
        self._loading.shutdown()

    def _begin(self, model: Model) -> None:
        loop = asyncio.get_running_loop()

        def deliver(batch: Sequence[QueuedRequest]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone when a drain was forced
                loop.call_soon_threadsafe(_finish, batch)

        self.observations[model] = self._metrics.watch(model)
        self.statistics[model] = EngineStatistics(self.observations[model])
        model.start(deliver, self.statistics[model])

    async def _reload_changed(self) -> None:
        """Look at the engine directories every `watch` seconds (never, at 0), load what changed, close what is
        unused."""
        while self._watch:
            await asyncio.sleep(self._watch)
            try:
                for change in self._repository.changed():
                    await self._act_on(change)
                await self._close_retired()
            except Exception as error:  # a file system has errors of its own; the watch must go on
                log.error("looking at the directories failed; it is tried again", exc_info=error)

    async def _close_retired(self) -> None:
        for model in [model for model in self._repository.retired if not model.users]:
            self._repository.retired.remove(model)
            self.observations.pop(model)
            self.statistics.pop(model)
            await asyncio.get_running_loop().run_in_executor(self._loading, model.close)

    async def _act_on(self, change: Change) -> None:
        """Load a changed directory, or judge its new parity report."""
        loop, key = asyncio.get_running_loop(), change.key
        old = self._repository.current(key)
        try:
            if change.trouble is not None:
                raise change.trouble
            if not change.reload:
                _judge(old, await loop.run_in_executor(self._loading, self._repository.begin_judging(key)))
                return
            model = await loop.run_in_executor(self._loading, self._repository.begin_reload(key))
        except Exception as error:  # a runtime's own, too; the watch must go on
            await self._refuse(change, error)
            return
        self._begin(model)
        self._repository.replace(key, model)
        self._metrics.reloaded(model, "done")
        log.info("reloaded", extra={"facts": _facts_of(model)})

    async def _refuse(self, change: Change, error: Exception) -> None:
        """Say why a change was not taken over; where there was no room for that, it is tried again."""
        old = self._repository.current(change.key)
        facts: dict[str, object] = {"model": old.name, "version": old.version, "directory": str(old.directory)}
        if change.reload:
            self._metrics.reloaded(old, "refused")
        if is_without_room(error):
            if change.trouble is None:
                self._repository.put_off(change.key)
            what = "reload" if change.reload else "look at the directory"
            reason = {"reason": str(error) or type(error).__name__}
            log.error(f"{what} put off; the old engine goes on", extra={"facts": {**facts, **reason}})
            return
        if not isinstance(error, NxmError):
            log.error("reload failed; the old engine goes on", extra={"facts": facts}, exc_info=error)
            return
        what = "reload refused" if change.trouble is None else "directory gone"
        log.error(f"{what}; the old engine goes on", extra={"facts": {**facts, "reason": str(error)}})
        if change.trouble is not None:
            return
        try:
            judged = self._repository.judging(change.key)
            _judge(old, await asyncio.get_running_loop().run_in_executor(self._loading, judged))
        except NxmError:  # no room to look at its report: once more, with all the rest
            self._repository.put_off(change.key)


def _judge(model: Model, objection: str | None) -> None:
    """Withdraw a model to whose parity there is an objection, and let one go on to which there is none any more."""
    facts = {"model": model.name, "version": model.version, "directory": str(model.directory)}
    if objection is not None and model.withdrawn is None:
        log.error("withdrawn; it answers no more", extra={"facts": {**facts, "reason": objection}})
    elif objection is None and model.withdrawn is not None:
        log.info("goes on; its parity is good enough again", extra={"facts": facts})
    model.withdrawn = objection


def _facts_of(model: Model) -> dict[str, object]:
    """The log's facts about a model that begins to serve."""
    return {
        "model": model.name,
        "version": model.version,
        "directory": str(model.directory),
        "backend": model.passport.backend,
        "sha256": model.passport.engine_sha256,
        "contents_sha256": model.passport.contents_sha256,
        "covers": model.passport.covers,
        "parity": _parity_of(model),
        "lengths": [bucket.length for bucket in model.buckets.buckets],
        "rows": model.buckets.longest.most,
    }


def _parity_of(model: Model) -> str:
    try:
        return gate_state(model.directory, model.passport)
    except NxmError:  # no room to look; when it was loaded there was
        return "unknown"


def _finish(batch: Sequence[QueuedRequest]) -> None:
    for queued in batch:
        if queued.answered is not None and not queued.answered.done():
            queued.answered.set_result(None)
