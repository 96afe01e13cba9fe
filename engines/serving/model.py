"""One engine directory behind one queue: checked, loaded, warmed up, and described in the protocol's words.

Nothing is served that was not checked: the passport's hash and machine, the hash that the caller expects, and the
parity gate. Warm-up runs every length bucket once (of engines that take any length, those of short texts and the
longest), every compiled shape and the largest batch once, so what would not fit the memory fails
before the first client comes, and the shapes of the outputs are known, not guessed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from engines.admission import admitted, require_unchanged
from engines.base import Engine, LoadOptions, backend
from engines.memory import require_room
from engines.passport import EnginePassport, covered_spec, covered_tokenizer
from engines.serving.batching import BatchQueue, Deliver, Limits, Observer, run_worker
from engines.serving.health import EngineHealth
from engines.serving.memory import return_freed
from engines.serving.protocol import InferRequest, TensorSpec
from engines.serving.settings import ModelOptions
from engines.serving.shapes import Bucket, Buckets, plan_buckets
from engines.serving.text import TextFrontend
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import ArtifactError, NxmError, RequestRefused, ServeError

TEXT_SUFFIX = "_text"
# Short sentences keep a core busy: beyond this a batch gains almost nothing and its first request waits.
CPU_MERGE, CPU_MERGE_TOKENS = 4, 2048
_WARMED = 512  # tokens up to which every bucket is run before the first client comes, where batches have any length


@dataclass(frozen=True)
class Endpoint:
    """A model name of the protocol: the engine itself, or its text frontend."""

    name: str
    model: Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    text_frontend: TextFrontend | None = None

    def require_fits(self, shape: tuple[int, ...]) -> None:
        """Raise `RequestRefused` (400) for an input with more rows or tokens than this model takes."""
        self.model.buckets.index(shape[0], 1 if self.text_frontend is not None else shape[1])

    def feeds(self, request: InferRequest) -> dict[str, np.ndarray]:
        """The engine's feeds, all of one shape (rows, length) and within the model's tables."""
        if self.text_frontend is not None:
            return self.text_frontend.tokens(request.tensors)
        shapes = {array.shape for array in request.tensors.values()}
        if len(shapes) != 1:
            raise RequestRefused(400, f"all inputs must have one shape (batch, sequence), got {sorted(shapes)}")
        for name, array in request.tensors.items():
            self.model.require_range(name, array)
        return dict(request.tensors)

    def results(self, request: InferRequest, outputs: Mapping[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
        """(datatype, array) of every output by name, from what the engine gave for the request."""
        results = {name: ("FP32", array) for name, array in outputs.items()}
        if self.text_frontend is not None:
            words = self.text_frontend.words(request.tensors, outputs)
            results |= {name: ("BYTES", array) for name, array in words.items()}
        return results


class Model:
    """A loaded engine directory. Make one with `open_model`; `start` before use, `close` after."""

    def __init__(
        self,
        name: str,
        version: str,
        directory: Path,
        passport: EnginePassport,
        engines: list[Engine],
        options: ModelOptions,
    ) -> None:
        self.name, self.version, self.directory = name, version, directory
        self.passport = passport
        self.spec = covered_spec(directory, passport)
        self.buckets = buckets_of(self.spec, passport, options)
        self.queue = BatchQueue(self.buckets, _limits(options, passport))
        self.withdrawn: str | None = None  # why it must not answer any more; set on the event loop alone
        self.users = 0  # requests between look-up and answer; counted on the event loop alone
        self._engines = engines
        facts = {"model": name, "version": version, "directory": str(directory)}
        shortest = self.buckets.buckets[0]
        self._health = [EngineHealth(partial(self._try, engine, shortest, 1), facts) for engine in engines]
        self._threads: list[threading.Thread] = []
        self._pads = {name: self.spec.pad_id if name == "input_ids" else 0 for name in engines[0].inputs}
        self._sequence_axes = {
            name: axes.index("sequence") for name, axes in self.spec.outputs.items() if "sequence" in axes
        }
        if set(self.spec.inputs) != set(engines[0].inputs):
            raise ServeError(
                f"{directory}: spec.json has the inputs {', '.join(self.spec.inputs)}, and the engine takes "
                f"{', '.join(engines[0].inputs)}; build it again"
            )
        longest = self.buckets.longest
        require_room(
            directory,
            [(longest.most, longest.length)],
            "serving batches of",
            copies=len(engines),
            way_out="lower --max-batch-tokens or --instances, or export with a lower --max-length",
        )
        shapes = self._warm_up()
        require_labelled(directory, self.spec, shapes[next(iter(self.spec.outputs))])
        inputs = tuple(TensorSpec(name, "INT64", (-1, -1)) for name in engines[0].inputs)
        outputs = tuple(TensorSpec(name, "FP32", shapes[name]) for name in self.spec.outputs)
        self.endpoints = [Endpoint(name, self, inputs, outputs)]
        if options.text:
            text_frontend = TextFrontend(covered_tokenizer(directory, passport), self.spec, self.buckets.longest.length)
            self.endpoints.append(
                Endpoint(
                    name + TEXT_SUFFIX, self, text_frontend.inputs, (*outputs, *text_frontend.outputs), text_frontend
                )
            )

    @property
    def platform(self) -> str:
        """The metadata's platform: Triton's words where it has one."""
        return {"ort": "onnxruntime_onnx", "trt": "tensorrt_plan"}.get(self.passport.backend, self.passport.backend)

    def start(self, deliver: Deliver, observer: Observer) -> None:
        """Start one thread per engine context."""
        for number, (engine, health) in enumerate(zip(self._engines, self._health, strict=True)):
            thread = threading.Thread(
                target=run_worker,
                args=(engine, self.queue, deliver, observer, self._pads, self._sequence_axes, health),
                name=f"{self.name}:{self.version}/{number}",
                daemon=True,
            )
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Answer what is queued, end the threads and free the engines."""
        self.queue.close()
        for thread in self._threads:
            thread.join()
        for engine in self._engines:
            engine.close()
        return_freed()

    @property
    def is_answering(self) -> bool:
        """False once it was withdrawn, once a thread of it that was started has ended, and while an engine of it
        fails."""
        return self.withdrawn is None and not self.has_ended and not any(health.failing for health in self._health)

    @property
    def has_ended(self) -> bool:
        """Whether a thread of it that was started has ended."""
        return not all(thread.is_alive() for thread in self._threads)

    def require_serving(self) -> None:
        """Raise `RequestRefused` (503) when the model was withdrawn."""
        if self.withdrawn is not None:
            raise RequestRefused(
                503, f"model {self.name!r} was withdrawn: its parity is not what --parity asks for", reason="withdrawn"
            )

    def require_range(self, name: str, array: np.ndarray) -> None:
        """Raise `RequestRefused` (400) for values that the model has no row or no meaning for."""
        limit = self.spec.limits.get(name, 2**63)
        if array.view(np.uint64).max() >= limit:  # a negative number is a huge one without its sign
            most = f" to {limit - 1}" if name in self.spec.limits else ""
            raise RequestRefused(400, f"values of {name} must be from 0{most}, got {array.min()} to {array.max()}")

    def _warm_up(self) -> dict[str, tuple[int, ...]]:
        """Run every bucket on every engine; returns the outputs' shapes with -1 where they depend on the input."""
        shapes = {}
        for engine in self._engines:
            for batch, sequence in self.passport.shapes:
                if batch <= self.buckets.most and sequence <= self.buckets.longest.length:  # no request has more
                    self._try(engine, Bucket(sequence, batch, batch), batch)
            for bucket in self.buckets.buckets:
                longest = bucket is self.buckets.longest
                if not (bucket.fixed or longest) and bucket.length > _WARMED:
                    continue  # no batch has just this length, and long ones take seconds each
                for rows in {1, bucket.most} if longest else {1}:
                    for name, array in self._try(engine, bucket, rows).items():
                        axes = self.spec.outputs.get(name, ())
                        if len(axes) != array.ndim:
                            raise ServeError(
                                f"{self.directory}: output {name} has shape {array.shape}, and spec.json says {axes}"
                            )
                        shapes[name] = tuple(
                            -1 if axis in ("batch", "sequence") else size
                            for axis, size in zip(axes, array.shape, strict=True)
                        )
        missing = set(self.spec.outputs) - set(shapes)
        if missing:
            raise ServeError(f"{self.directory}: spec.json names outputs that the engine does not have: {missing}")
        return shapes

    def _try(self, engine: Engine, bucket: Bucket, rows: int) -> dict[str, np.ndarray]:
        """Outputs for rows of padding with full attention, as the engine gives them."""
        shape = (max(rows, bucket.least), bucket.length)
        feeds = {name: np.full(shape, pad, np.int64) for name, pad in self._pads.items()}
        feeds["attention_mask"][:] = 1
        try:
            outputs = engine.run(feeds)
        except NxmError:
            raise
        except Exception as error:  # a runtime raises what it likes, and this is where it meets the engine first
            raise ServeError(
                f"{self.directory}: the engine fails at batch {shape[0]} and length {shape[1]}: {error}"
            ) from error
        wrong = [name for name, array in outputs.items() if not np.isfinite(array).all()]
        if wrong:  # each of its answers would be an error
            raise ServeError(
                f"{self.directory}: the engine gives NaN or infinity in {', '.join(wrong)} at batch {shape[0]} and "
                f"length {shape[1]}; run `nxm compare --bisect`, and build it again"
            )
        return outputs


def buckets_of(spec: IOSpec, passport: EnginePassport, options: ModelOptions) -> Buckets:
    """The buckets of an engine as it is served; raises what `plan_buckets` raises."""
    return plan_buckets(
        spec.max_length,
        options.max_batch,
        passport.profiles,
        options.lengths,
        max_batch_tokens=options.max_batch_tokens,
        compiled=passport.shapes,
    )


def _limits(options: ModelOptions, passport: EnginePassport) -> Limits:
    """What the queue of an engine may hold and merge."""
    merge, tokens = options.merge, options.max_batch_tokens
    if merge is None and backend(passport.backend).CAPABILITIES.device == "cpu":
        merge, tokens = CPU_MERGE, min(tokens, CPU_MERGE_TOKENS)
    return Limits(options.max_queue, options.max_delay, options.max_batch if merge is None else merge, tokens)


def require_labelled(directory: Path, spec: IOSpec, shape: Sequence[int]) -> None:
    """Raise `ArtifactError` unless there is a label for every class of the first output, which has this shape."""
    if spec.labels and TASKS[spec.task].names_labels and shape[-1] not in (-1, len(spec.labels)):
        raise ArtifactError(
            f"{directory}: its engine gives {shape[-1]} numbers, and its spec.json names {len(spec.labels)} labels; "
            "build it again from its graph"
        )


def open_model(name: str, version: str, directory: Path, options: ModelOptions) -> Model:
    """Check an engine directory, load it `options.instances` times and warm it up.

    Raises `ArtifactError` for a passport that does not fit the file or the machine, `ServeError` for a hash that was
    not expected, `ParityError` for a failed gate, `EngineUnavailable` where it cannot run.
    """
    passport = admitted(directory, options.gate, options.expect_sha256)
    runtime = backend(passport.backend)
    on_cpu = runtime.CAPABILITIES.device == "cpu"
    cores = len(os.sched_getaffinity(0))
    instances = options.instances or (cores if on_cpu else 1)
    load_options = LoadOptions(threads=options.threads or max(1, cores // instances))
    with ExitStack() as stack:
        engines = [stack.enter_context(runtime.load(directory, load_options)) for _ in range(instances)]
        require_unchanged(directory, passport)
        model = Model(name, version, directory, passport, engines, options)
        stack.pop_all()  # from here on `Model.close` frees them
    return model
