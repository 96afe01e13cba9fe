"""A model's ``config.pbtxt``, out of the engine file's own bindings and profiles.

Everything is written out, so that the server need not guess (``--disable-auto-complete-config`` works): types as the
*engine* has them, which an old TensorRT may have changed from the graph's, dims without the batch, one execution
context a profile, a warm-up a profile. Dynamic batching has no delay, like `engines.serving`: what queued while the
model was busy runs together. There is no queue policy: any of its fields turns off the scheduler's prefetching, and
then a lone request can wait for half a second (measured on Triton 2.51; docs/serving.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.base import Binding, Profile
from engines.ort.session_levels import BASIC, SessionLevel
from engines.passport import EnginePassport
from engines.serving.settings import INSTANCE_KINDS
from engines.triton.pbtxt import Message, Word, dump
from nxm_export.contract.io_spec import IOSpec
from nxm_export.errors import ServeError

BACKENDS = {
    "ort": ("onnxruntime", "onnxruntime_onnx", "model.onnx"),
    "trt": ("tensorrt", "tensorrt_plan", "model.plan"),
}
_TYPES = {
    "bool": "TYPE_BOOL", "int8": "TYPE_INT8", "uint8": "TYPE_UINT8", "int32": "TYPE_INT32", "int64": "TYPE_INT64",
    "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
}  # fmt: skip
_BASIC = -1  # the level, as Triton's onnxruntime backend numbers them
KINDS = {kind: f"KIND_{kind.upper()}" for kind in INSTANCE_KINDS}


@dataclass(frozen=True)
class Instances:
    """How many copies of a model run, on what (one of `KINDS`), and, of an ONNX Runtime engine, with how many CPU
    threads each."""

    kind: str
    count: int = 1
    threads: int | None = None


def engine_config(
    name: str,
    passport: EnginePassport,
    spec: IOSpec,
    instances: Instances,
    *,
    max_batch: int,
    files: Mapping[str, str],
    session: SessionLevel | None = None,
) -> str:
    """The configuration of an engine; `files` are the model files of one version by compute capability, "" for any.

    `session` says at which level of optimization ONNX Runtime comes closest to the proven session.
    """
    backend, platform, default = BACKENDS[passport.backend]
    profiles = passport.profiles
    inputs, outputs = passport.tensors("inputs"), passport.tensors("outputs")
    if any(binding.shape[:1] != (-1,) for binding in (*inputs, *outputs)):
        raise ServeError(f"{name}: the engine has a fixed batch; build it with a profile whose batch is free")
    rows = batch_size(name, profiles, max_batch)
    by_capability = {capability: file for capability, file in files.items() if capability}
    group: Message = {"kind": Word(KINDS[instances.kind]), "count": instances.count}
    if profiles and passport.backend == "trt":
        group["profile"] = [str(i) for i in range(len(profiles))]
    return (
        _header(name, passport)
        + _session_comment(session)
        + dump(
            {
                "name": name,
                "backend": backend,
                "platform": platform,
                "max_batch_size": rows,
                "default_model_filename": files.get("", next(iter(by_capability.values()), default)),
                "cc_model_filenames": [{"key": cc, "value": file} for cc, file in by_capability.items()],
                "input": [_tensor(binding) for binding in inputs],
                "output": [_tensor(binding) for binding in outputs],
                "version_policy": {"latest": {"num_versions": 1}},
                "dynamic_batching": {"max_queue_delay_microseconds": 0},
                "instance_group": [group],
                "optimization": {"graph": {"level": _BASIC}}
                if session is not None and session.level == BASIC
                else None,
                "parameters": _threads(instances.threads) if passport.backend == "ort" else [],
                "model_warmup": [_warm_up(rows, profile, inputs) for profile in profiles or (_any_shape(spec),)],
            }
        )
    )


def batch_size(name: str, profiles: Sequence[Profile], max_batch: int) -> int:
    """The most rows, up to `max_batch`, of which every number fits a profile at every length that the engine takes.

    Triton has one limit for all lengths, and its batcher makes batches of any size up to it. Raises `ServeError` when
    not even a single row always fits: unlike `engines.serving`, Triton does not fill batches up.
    """
    most = max_batch
    for length in range(1, max((p.maximum[1] for p in profiles), default=0) + 1):
        fitting = [p for p in profiles if p.minimum[1] <= length <= p.maximum[1]]
        rows = 0
        while rows < most and any(p.minimum[0] <= rows + 1 <= p.maximum[0] for p in fitting):
            rows += 1
        if fitting and not rows:
            raise ServeError(
                f"{name}: no profile takes a single row of {length} tokens, and Triton may send one; "
                "build the engine with profiles that begin at batch 1"
            )
        most = rows if fitting else most
    return most


@dataclass(frozen=True)
class LastStep:
    """The model of a text ensemble behind the engine: it makes `words` (``label`` or ``answer``) of the engine's
    outputs `reads`, and, with `texts`, of the request's texts."""

    suffix: str
    words: str
    reads: tuple[str, ...]
    texts: bool = False


def text_configs(
    name: str, passport: EnginePassport, *, max_batch: int, texts: Mapping[str, bool], last: LastStep | None
) -> dict[str, str]:
    """Configurations of the text frontend, by model name: a tokenizer, an ensemble, and, with `last`, a model that says
    in words what the engine found.

    `texts` are the inputs by name, and whether a request may leave them out.
    """
    inputs, outputs = passport.tensors("inputs"), passport.tensors("outputs")
    words = [{**_text(key), **({"optional": True} if optional else {})} for key, optional in texts.items()]
    batch = batch_size(name, passport.profiles, max_batch)
    python: Message = {"backend": "python", "max_batch_size": batch}
    workers: Message = {"instance_group": [{"kind": Word("KIND_CPU"), "count": 1}]}
    tokenizer, ensemble = f"{name}_tokenizer", f"{name}_text"
    read = [b for b in outputs if last is not None and b.name in last.reads]
    tokens = {b.name: f"tokens_{b.name}" for b in inputs}
    given = {b.name: passed(b.name) if b in read else b.name for b in outputs}
    stages = [
        _stage(tokenizer, {key: key for key in texts}, tokens),
        _stage(name, tokens, given),
    ]
    messages: dict[str, Message] = {
        tokenizer: {
            "name": tokenizer, **python, "input": words, "output": [_tensor(b) for b in inputs], **workers,
        }
    }  # fmt: skip
    if last is not None:
        # The logits pass through this model: an ensemble does not compute an output of its own that nobody asks for,
        # and would then wait for it when only the words are asked for (seen on Triton 2.51).
        namer = f"{name}{last.suffix}"
        again = {key: key for key in texts} if last.texts else {}
        stages.append(
            _stage(
                namer,
                {**again, **{passed(b.name): passed(b.name) for b in read}},
                {key: key for key in (*(b.name for b in read), last.words)},
            )
        )
        messages[namer] = {
            "name": namer, **python,
            "input": [*(words if last.texts else []), *({**_tensor(b), "name": passed(b.name)} for b in read)],
            "output": [*map(_tensor, read), _text(last.words)], **workers,
        }  # fmt: skip
    messages[ensemble] = {
        "name": ensemble,
        "platform": "ensemble",
        "max_batch_size": batch,
        "input": words,
        "output": [*(_tensor(b) for b in outputs), *([] if last is None else [_text(last.words)])],
        "ensemble_scheduling": {"step": stages},
    }
    return {key: dump(message) for key, message in messages.items()}


def passed(output: str) -> str:
    """What the last step of an ensemble calls an output of the engine that it reads and hands on."""
    return f"engine_{output}"


def _stage(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> Message:
    """One model of an ensemble: its inputs and outputs, and what the ensemble calls them."""
    return {
        "model_name": model,
        "model_version": -1,
        "input_map": [{"key": key, "value": value} for key, value in inputs.items()],
        "output_map": [{"key": key, "value": value} for key, value in outputs.items()],
    }


def _header(name: str, passport: EnginePassport) -> str:
    version = passport.requires.get("tensorrt")
    built = f"TensorRT {version}, {passport.device.get('gpu', 'GPU')}" if version else passport.backend
    return f"# {name}: engine sha256 {passport.engine_sha256}\n# built with {built}; written by `nxm triton`\n"


def _session_comment(session: SessionLevel | None) -> str:
    return "" if session is None else f"# ONNX Runtime with {session.level} optimizations: {session.words}\n"


def _tensor(binding: Binding) -> Message:
    if binding.dtype not in _TYPES:
        raise ServeError(f"{binding.name}: Triton has no type for {binding.dtype}")
    return {"name": binding.name, "data_type": Word(_TYPES[binding.dtype]), "dims": list(binding.shape[1:])}


def _text(name: str) -> Message:
    return {"name": name, "data_type": Word("TYPE_STRING"), "dims": [1]}


def _threads(threads: int | None) -> list[Message]:
    """Parameters of Triton's onnxruntime backend; without them every instance starts a thread per core."""
    if threads is None:
        return []
    return [{"key": "intra_op_thread_count", "value": {"string_value": str(threads)}}]


def _any_shape(spec: IOSpec) -> Profile:
    middle = min(32, spec.max_length)
    return Profile((1, 1), (1, middle), (1, spec.max_length))


def _warm_up(rows: int, profile: Profile, inputs: Sequence[Binding]) -> Message:
    batch, length = min(rows, profile.optimum[0]), profile.optimum[1]
    return {
        "name": f"batch {batch} length {length}",
        "batch_size": batch,
        "inputs": [
            {
                "key": binding.name,
                "value": {"data_type": Word(_TYPES[binding.dtype]), "dims": [length], "zero_data": True},
            }
            for binding in inputs
        ],
    }
