"""HTTP: routes of the Open Inference Protocol, errors as JSON, request ids, deadlines, disconnects.

An answer is a result or ``{"error": "..."}`` with a status: 400 for a malformed request, 404 for an unknown model, 413
for a body that is too large, 503 with Retry-After when the queue is full, 504 when the deadline passed, 500 with a
request id (and nothing else; the log has the rest) for a failure of ours.

The event loop answers everybody, so nothing that grows with a request is done on it: a body that is not small is
inflated, parsed and tokenized in a thread, and a large answer is written there. The deadline runs from the first byte
of a request, through all of this. Where what is done: `engines.serving.lanes`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.serving.batching import QueuedRequest
from engines.serving.http.connection import BEGAN
from engines.serving.http.content_coding import coding_of, inflated
from engines.serving.http.open_files import AcceptFailures
from engines.serving.http.spare_connections import SPARE
from engines.serving.lanes import Lanes
from engines.serving.live_models import LiveModels
from engines.serving.metrics import Metrics
from engines.serving.model import Endpoint, Model
from engines.serving.protocol import HEADER_LENGTH, InferRequest, parse_infer, parse_json, render_infer
from engines.serving.repository import Repository
from engines.serving.settings import RequestLimits
from engines.serving.statistics import AnswerStatistics, model_config
from nxm_export import __version__
from nxm_export.errors import RequestRefused

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route
    from starlette.types import Receive

log = logging.getLogger("nxm.serve")
OPENAPI_FILE = Path(__file__).with_name("openapi.json")
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "schedule_policy",
    "statistics",
)
# What is done on the event loop, well under a millisecond each; more goes to a thread.
INLINE_TEXT = 4096  # bytes of a request that holds texts
INLINE_JSON = 32 << 10  # bytes of JSON of a request that holds tokens
INLINE_VALUES = 4096  # numbers in an answer
_DRAINED = 16  # a body of up to this many times the limit is read and dropped, so that the client gets to read its 413
_BODIES = 32  # so many bodies of the largest size may be held at once
_REASONS = {
    400: "malformed",
    404: "unknown_model",
    413: "too_large",
    415: "malformed",
    503: "queue_full",
    504: "deadline",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}\Z")


class _Disconnected(Exception):
    """The client went away; nobody reads the answer."""


class Service:
    """A repository behind HTTP, with what lives as long as the event loop. `application` is the ASGI application."""

    def __init__(self, repository: Repository, limits: RequestLimits, *, watch: float, access_log: bool) -> None:
        self.repository = repository
        self.metrics = Metrics()
        self.limits = limits
        self.draining = False
        self.models = LiveModels(repository, self.metrics, watch=watch)
        self._access_log = access_log
        self._answers: dict[tuple[str, str], AnswerStatistics] = {}  # by name and version
        self._held = 0  # bytes of bodies that have arrived and are not answered
        self._lanes = Lanes()
        self._prefix = os.urandom(4).hex()
        self._numbers = itertools.count(1)
        self.metrics.ready.set_function(lambda: float(self.ready))

    @property
    def ready(self) -> bool:
        """True while requests are welcome."""
        return self.repository.ready and not self.draining

    def application(self) -> Starlette:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException

        handlers = {RequestRefused: _refused, HTTPException: _http_error}
        application = Starlette(routes=self._routes(), exception_handlers=handlers, lifespan=self._lifespan)
        application.router.redirect_slashes = False  # a redirect would be neither a result nor an error
        return application

    def _routes(self) -> list[Route]:
        from starlette.responses import FileResponse, JSONResponse, Response
        from starlette.routing import Route

        async def metadata(request: Request) -> Response:
            return JSONResponse(self._metadata(self._endpoint(request)))

        async def model_ready(request: Request) -> Response:
            endpoint = self._endpoint(request)
            ready = not self.draining and endpoint.model.is_answering
            return JSONResponse({"name": endpoint.name, "ready": ready}, 200 if ready else 503)

        async def server_ready(_: Request) -> Response:
            return JSONResponse({"ready": self.ready}, 200 if self.ready else 503)

        async def live(_: Request) -> Response:
            return JSONResponse({"live": True})

        async def config(request: Request) -> Response:
            return JSONResponse(model_config(self._endpoint(request)))

        async def stats(request: Request) -> Response:
            return JSONResponse({"model_stats": self._model_stats(request)})

        async def server(_: Request) -> Response:
            return JSONResponse({"name": "nxm-export", "version": __version__, "extensions": EXTENSIONS})

        async def index(request: Request) -> Response:
            body = await self._body(request)
            self._held -= len(body)
            return JSONResponse(self._index(body))

        async def metrics(_: Request) -> Response:
            text, kind = self.metrics.text()
            return Response(text, headers={"content-type": kind})

        async def openapi(_: Request) -> Response:
            return FileResponse(OPENAPI_FILE, media_type="application/json")

        both = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
        return [
            Route("/v2/models/stats", stats),
            *(Route(f"{path}/stats", stats) for path in both),
            *(Route(f"{path}/config", config) for path in both),
            *(Route(f"{path}/infer", self._answer, methods=["POST"]) for path in both),
            *(Route(f"{path}/ready", model_ready) for path in both),
            *(Route(path, metadata) for path in both),
            Route("/v2/health/live", live),
            Route("/v2/health/ready", server_ready),
            Route("/v2", server),
            Route("/v2/repository/index", index, methods=["POST"]),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
        ]

    def _endpoint(self, request: Request) -> Endpoint:
        """What the path of a request names; raises `RequestRefused` (404)."""
        return self.repository.find(request.path_params["model"], request.path_params.get("version"))

    async def _answer(self, request: Request) -> Response:
        """An inference request's response; errors become JSON here, so that each is counted and has its request id."""
        from starlette.responses import Response

        began = request.scope.get("state", {}).get(BEGAN, time.monotonic())
        id_ = request.headers.get("x-request-id", "")
        if not _REQUEST_ID.match(id_):
            id_ = f"{self._prefix}-{next(self._numbers)}"
        model: Model | None = None
        status, reason, body = 200, "", b""
        try:
            body = await self._body(request)
            if request.scope.get(SPARE):
                raise RequestRefused(503, str(request.scope[SPARE]), retry_after=1, reason="connections")
            endpoint = self._endpoint(request)
            model = endpoint.model
            model.users += 1
            try:
                headers, content = await self._infer(endpoint, request, body, began)
            finally:
                model.users -= 1
            self.models.observations[model].answer(time.monotonic() - began)
            response = Response(content)
            response.raw_headers += [*headers, (b"x-request-id", id_.encode("ascii"))]
        except RequestRefused as error:
            status, reason = error.status, str(error)
            self.metrics.rejected(model, error.reason or _REASONS[status])
            self.metrics.answered(model, status)
            response = _error(status, reason, {"x-request-id": id_, **_headers(error)})
        except asyncio.CancelledError:  # by the server alone: it stops, and waits no longer
            status, reason = 503, "the server stops, and has no more time for this request"
            self.metrics.rejected(model, "stopping")
            self.metrics.answered(model, status)
            response = _error(status, reason, {"x-request-id": id_, "retry-after": "1"})
        except _Disconnected:
            status, reason = 499, "the client went away"
            self.metrics.rejected(model, "disconnected")
            response = Response(status_code=499)
        except Exception as error:  # ours or the engine's: the log says what, the client learns only where to look
            status, reason = 500, f"{type(error).__name__}: {error}"
            log.error("request failed", extra={"facts": {"request": id_}}, exc_info=error)
            self.metrics.rejected(model, "failed")
            self.metrics.answered(model, status)
            response = _error(500, f"internal error; the log has request {id_}", {"x-request-id": id_})
        finally:
            self._held -= len(body)
        if status != 200 and model is not None:
            self._answers_of(endpoint).fail.add(time.monotonic() - began)
        if self._access_log:
            name = request.path_params["model"] if model is None else f"{model.name}:{model.version}"
            facts = {"request": id_, "model": name, "status": status, "ms": round(1e3 * (time.monotonic() - began), 3)}
            log.info("request", extra={"facts": facts | ({"reason": reason} if reason else {})})
        return response

    async def _infer(
        self, endpoint: Endpoint, request: Request, body: bytes, began: float
    ) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Headers and body of the answer to a request whose first byte came at `began`."""
        endpoint.model.require_serving()
        queue, limits = endpoint.model.queue, self.limits
        if time.monotonic() > began + limits.timeout:
            raise _late(limits.timeout)
        coding = coding_of(", ".join(request.headers.getlist("content-encoding")))
        length = request.headers.get(HEADER_LENGTH)

        def prepare(most: int) -> tuple[InferRequest, dict[str, np.ndarray]]:
            plain = inflated(body, coding, most)
            asked = parse_infer(plain, length, endpoint.inputs, endpoint.outputs, endpoint.require_fits)
            return asked, endpoint.feeds(asked)

        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        timer = _expire_at(began + limits.timeout, done, limits.timeout)
        watcher = loop.create_task(_watch(request.receive, done))
        queued: QueuedRequest | None = None
        lane: ThreadPoolExecutor | None = None
        try:
            if not coding and _is_small(endpoint, body, length):
                asked, feeds = prepare(limits.max_body)
            else:
                (asked, feeds), lane = await self._lanes.prepare(prepare, len(body), limits.max_body, done)
            timeout = min(asked.timeout or limits.timeout, limits.timeout)
            if asked.timeout is not None:
                timer.cancel()
                timer = _expire_at(began + timeout, done, timeout)
            queued = QueuedRequest(feeds, began + timeout, done)
            queue.submit(queued)
            await done
        except BaseException:
            if queued is not None:
                queue.cancel(queued)
            raise
        finally:
            timer.cancel()
            watcher.cancel()
            if done.done() and not done.cancelled():
                done.exception()  # nobody else asks for it when the request has failed already
        if queued.error is not None:
            raise queued.error
        values = sum(array.size for array in queued.outputs.values())
        if lane is None and values <= INLINE_VALUES:
            answer = _render(endpoint, asked, queued)
        else:  # numbers become text, and an answer is looked up in the tokens of its text
            lane = self._lanes.of_answer(values, lane)
            answer = await loop.run_in_executor(lane, _render, endpoint, asked, queued)
        self._answers_of(endpoint).answered(queued.rows, time.monotonic() - began)
        return answer

    async def _body(self, request: Request) -> bytes:
        """The whole body, as it was sent, whose bytes count as held until the caller takes them off; raises
        `RequestRefused`: 413 beyond the limit, 503 when too many bytes are held already."""
        limit = self.limits.max_body
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > _DRAINED * limit:
            raise RequestRefused(413, f"the body is larger than {limit} bytes")
        chunks, size, held, more = list[bytes](), 0, 0, True
        try:
            while more and size <= _DRAINED * limit:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise _Disconnected
                more = message.get("more_body", False)
                chunk = message["body"]
                size += len(chunk)
                if size > limit:
                    chunks.clear()
                    self._held, held = self._held - held, 0
                    continue
                if self._held + len(chunk) > _BODIES * limit:
                    raise RequestRefused(503, f"{self._held} bytes of requests are held already", retry_after=1)
                chunks.append(chunk)
                self._held, held = self._held + len(chunk), held + len(chunk)
            if size > limit:
                raise RequestRefused(413, f"the body is larger than {limit} bytes")
        except BaseException:
            self._held -= held
            raise
        return b"".join(chunks)

    def _answers_of(self, endpoint: Endpoint) -> AnswerStatistics:
        return self._answers.setdefault((endpoint.name, endpoint.model.version), AnswerStatistics())

    def _model_stats(self, request: Request) -> list[dict[str, object]]:
        """Statistics of what the path of a request names: a version, a model, or all."""
        name, version = request.path_params.get("model"), request.path_params.get("version")
        if name is None:
            endpoints = [self.repository.find(each["name"], each["version"]) for each in self.repository.index()]
        else:
            one = self.repository.find(name, version)
            versions = [version] if version else self.repository.versions(one.name)
            endpoints = [self.repository.find(one.name, each) for each in versions]
        return [
            {
                "name": endpoint.name,
                "version": endpoint.model.version,
                **self.models.statistics[endpoint.model].to_dict(self._answers_of(endpoint)),
            }
            for endpoint in endpoints
        ]

    def _metadata(self, endpoint: Endpoint) -> dict[str, object]:
        """The model metadata of the protocol, with the hashes of the engine that answers."""
        passport = endpoint.model.passport
        return {
            "name": endpoint.name,
            "versions": self.repository.versions(endpoint.name),
            "platform": endpoint.model.platform,
            "inputs": [spec.to_dict() for spec in endpoint.inputs],
            "outputs": [spec.to_dict() for spec in endpoint.outputs],
            "parameters": {
                "engine_sha256": passport.engine_sha256,
                **({"contents_sha256": passport.contents_sha256} if passport.contents_sha256 else {}),
            },
        }

    def _index(self, body: bytes) -> list[dict[str, str]]:
        small = len(body) <= INLINE_TEXT  # it is parsed on the event loop
        asked = parse_json(body) if small and body.strip() else {}
        if not small or not isinstance(asked, dict) or not isinstance(asked.get("ready") or False, bool):
            raise RequestRefused(400, 'the body must be empty or a JSON object like {"ready": true}')
        return [entry for entry in self.repository.index() if not asked.get("ready") or entry["state"] == "READY"]

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(AcceptFailures().handle)
        running = loop.create_task(self.models.run())
        try:
            yield
        finally:
            self.draining = True
            self.repository.stop_opening()
            running.cancel()
            self._lanes.close()
            await self.models.close()


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestRefused), "it is registered for these alone"
    return _error(error.status, str(error), _headers(error))


async def _http_error(_: Request, error: Exception) -> Response:
    from starlette.exceptions import HTTPException

    assert isinstance(error, HTTPException), "it is registered for these alone"
    text = {404: "no such path; see /openapi.json", 405: "this path does not take this method"}
    return _error(error.status_code, text.get(error.status_code, error.detail), error.headers or {})


def _error(status: int, text: str, headers: Mapping[str, str]) -> Response:
    """An error as JSON in ASCII, whatever characters of a request it repeats."""
    from starlette.responses import Response

    return Response(json.dumps({"error": text}), status, headers, "application/json")


def _is_small(endpoint: Endpoint, body: bytes, length: str | None) -> bool:
    """Whether an uncompressed request takes no time worth a thread; binary tensors take none at all."""
    if endpoint.text_frontend is not None:
        return len(body) <= INLINE_TEXT
    return len(body) <= INLINE_JSON or (length is not None and length.isdecimal() and len(length) <= 4)


def _expire_at(deadline: float, done: asyncio.Future[None], timeout: float) -> asyncio.TimerHandle:
    """Ends the wait at `deadline`, on `time.monotonic`."""
    loop = asyncio.get_running_loop()
    return loop.call_at(loop.time() + deadline - time.monotonic(), _expire, done, timeout)


def _expire(done: asyncio.Future[None], timeout: float) -> None:
    if not done.done():
        done.set_exception(_late(timeout))


def _late(timeout: float) -> RequestRefused:
    return RequestRefused(504, f"no result within {timeout:g} seconds")


async def _watch(receive: Receive, done: asyncio.Future[None]) -> None:
    """End the wait when the client goes away: what it asked for must not take an engine's time."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not done.done():
        done.set_exception(_Disconnected())


def _render(endpoint: Endpoint, asked: InferRequest, queued: QueuedRequest) -> tuple[list[tuple[bytes, bytes]], bytes]:
    return render_infer(endpoint.name, endpoint.model.version, asked, endpoint.results(asked, queued.outputs))


def _headers(error: RequestRefused) -> dict[str, str]:
    return {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
