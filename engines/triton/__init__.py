"""Hand engine directories over to Triton: a model repository that it loads as it is, and what deploys it.

::

    REPO/NAME/config.pbtxt, REPO/NAME/1/model.onnx or model_sm80.plan ...    the engine (one plan a compute capability)
    REPO/NAME_tokenizer/, REPO/NAME_labels/, REPO/NAME_text/                 sentences in, class names out (optional)
    REPO/manifest.json, REPO/check_manifest.py                               hashes, and the TensorRT that plans need
    REPO/Dockerfile, REPO/compose.yaml, REPO/kserve.yaml                     containers; Triton ignores files up here

The same client code works on `nxm serve` and on Triton: same protocol, model names, inputs and outputs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.passport import EnginePassport, load_passport
from engines.serving.repository import Source
from engines.serving.shapes import plan_buckets
from engines.serving.text import BYTES_PER_TOKEN, names_classes
from engines.triton.check_manifest import MANIFEST, same_version
from engines.triton.config import BACKENDS, KINDS, engine_config, text_configs
from engines.triton.deploy import DEFAULT_IMAGE, deployment_files
from nxm_export.contract.io_spec import TOKENIZER_FILE, IOSpec, load_spec
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import ArtifactError, ServeError
from nxm_export.storage.atomic import atomic_dir
from nxm_export.storage.hashing import file_hash, file_hashes
from nxm_export.storage.json_files import to_builtins

SCHEMA = "nxm-triton/1"
VERSION = "1"
CHECK = "check_manifest.py"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class TritonOptions:
    """How a repository is written. `kind` (cpu or gpu) is by default what the engine runs on; `threads` are those of an
    ONNX Runtime instance on a CPU; `tensorrt` is the version in the target container, where it is known already."""

    text: bool = False
    pair: bool = False
    kind: str | None = None
    instances: int = 1
    threads: int | None = None
    max_batch: int = 32
    image: str = DEFAULT_IMAGE
    tensorrt: str | None = None


@dataclass(frozen=True)
class _Group:
    """Engine directories that are one model: one, or several for different compute capabilities."""

    name: str
    directories: tuple[Path, ...]
    passports: tuple[EnginePassport, ...]
    spec: IOSpec


def export_repository(
    sources: Sequence[Source], out: Path | str, options: TritonOptions = TritonOptions()
) -> dict[str, Any]:
    """Write the repository `out` and return its manifest; `sources` of one name are one model for several GPUs.

    An existing `out` is replaced if it is a repository of ours. Raises `ServeError` for engines that Triton cannot
    load, `ArtifactError` for damaged ones.
    """
    out = Path(out)
    groups = [_group(name, sources) for name in dict.fromkeys(source.name for source in sources)]
    if not groups:
        raise ServeError("nothing to hand over: give at least one engine directory")
    if out.is_dir() and any(out.iterdir()) and not (out / CHECK).is_file():  # an engine directory, for example
        raise ArtifactError(f"{out} exists and is no repository of ours (no {CHECK}); choose another --out")
    tensorrt = _tensorrt(groups, options)
    with atomic_dir(out) as scratch:
        for group in groups:
            _write_model(scratch, group, options)
        gpu = any(_kind(group.passports[0], options) == "gpu" for group in groups)
        models = sorted(path.name for path in scratch.iterdir())
        manifest = {
            "schema": SCHEMA,
            "image": options.image,
            "tensorrt": tensorrt,
            "models": {group.name: [_facts(p) for p in group.passports] for group in groups},
            "files": file_hashes(scratch),
        }
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(_HERE / CHECK, scratch / CHECK)
        tag = f"{groups[0].name.lower()}:{file_hash(scratch / MANIFEST)[:12]}"
        for name, text in deployment_files(
            groups[0].name, tag, models, options.image, text=options.text, gpu=gpu
        ).items():
            (scratch / name).write_text(text, encoding="utf-8")
    return manifest


def _group(name: str, sources: Sequence[Source]) -> _Group:
    directories = tuple(source.directory for source in sources if source.name == name)
    passports = tuple(load_passport(directory) for directory in directories)
    for directory, passport in zip(directories, passports, strict=True):
        if passport.backend not in BACKENDS:
            raise ServeError(
                f"{directory}: Triton has no backend for {passport.backend} engines; build one of "
                f"{', '.join(BACKENDS)} "
                "(TensorRT-RTX engines are another format than TensorRT's, and run with `nxm serve`)"
            )
    first = passports[0]
    if len(passports) > 1:
        capabilities = [passport.device.get("compute_capability") for passport in passports]
        if first.backend != "trt" or None in capabilities or len(set(capabilities)) != len(capabilities):
            raise ServeError(
                f"{name}: {len(passports)} engines of one name must be TensorRT engines for "
                "different compute capabilities, "
                f"found {', '.join(map(str, capabilities))}; give them different names"
            )
        if any(p.bindings != first.bindings or p.profiles != first.profiles for p in passports):
            raise ServeError(f"{name}: the engines differ in their inputs, outputs or profiles; build them alike")
        if len({passport.onnx_sha256 for passport in passports}) > 1:
            raise ServeError(f"{name}: the engines come from different graphs; build all of them from one")
    return _Group(name, directories, passports, load_spec(directories[0]))


def _write_model(repository: Path, group: _Group, options: TritonOptions) -> None:
    first, spec = group.passports[0], group.spec
    version = repository / group.name / VERSION
    version.mkdir(parents=True)
    files: dict[str, str] = {}
    default = BACKENDS[first.backend][2]
    for directory, passport in zip(group.directories, group.passports, strict=True):
        capability = str(passport.device.get("compute_capability", "")) if first.backend == "trt" else ""
        files[capability] = default if not capability else f"model_sm{capability.replace('.', '')}.plan"
        data = passport.read_engine(directory, passport.requires)  # the machine it runs on is checked there, not here
        (version / files[capability]).write_bytes(data)
    kind = _kind(first, options)
    config = engine_config(
        group.name,
        first,
        spec,
        kind=kind,
        instances=options.instances,
        max_batch=options.max_batch,
        threads=options.threads,
        files=files,
    )
    (repository / group.name / "config.pbtxt").write_text(config, encoding="utf-8")
    if options.text:
        _write_text_face(repository, group, options)


def _write_text_face(repository: Path, group: _Group, options: TritonOptions) -> None:
    first, spec, directory = group.passports[0], group.spec, group.directories[0]
    if not (directory / TOKENIZER_FILE).is_file():
        raise ArtifactError(f"{directory} has no {TOKENIZER_FILE}, which --text needs; copy it from the checkpoint")
    if TASKS[spec.task].output_kind == "span":
        raise ServeError(
            f"{group.name}: --text gives no answers in words for {spec.task} on Triton, only "
            "positions of tokens that its clients "
            "do not see; hand it over without --text, or serve it with `nxm serve --text`"
        )
    wants = TASKS[spec.task].texts
    if options.pair and wants == "one":
        raise ServeError(f"{directory}: {spec.task} reads one text at a time; use --text, not --text-pair")
    if not options.pair and wants == "two":
        raise ServeError(f"{directory}: {spec.task} reads a query and a document at once; use --text-pair")
    labels = names_classes(spec)
    buckets = plan_buckets(spec.max_length, options.max_batch, first.profiles)
    configs = text_configs(group.name, first, spec, max_batch=options.max_batch, pair=options.pair, labels=labels)
    for name, text in configs.items():
        (repository / name / VERSION).mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(text, encoding="utf-8")
    tokenizer = repository / f"{group.name}_tokenizer" / VERSION
    shutil.copyfile(_HERE / "tokenizer_model.py", tokenizer / "model.py")
    shutil.copyfile(directory / TOKENIZER_FILE, tokenizer / TOKENIZER_FILE)
    settings: dict[str, Any] = {
        "inputs": {binding.name: binding.dtype for binding in first.tensors("inputs")},
        "lengths": [bucket.length for bucket in buckets.buckets],
        "max_length": min(spec.max_length, buckets.longest.length),
        "max_bytes": BYTES_PER_TOKEN * spec.max_length,
        "pad_id": spec.pad_id,
        "pair": options.pair,
    }
    (tokenizer / "text.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    if labels:
        last = repository / f"{group.name}_labels" / VERSION
        shutil.copyfile(_HERE / "labels_model.py", last / "model.py")
        names = {"output": first.tensors("outputs")[0].name, "labels": list(spec.labels)}
        (last / "labels.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")


def _kind(passport: EnginePassport, options: TritonOptions) -> str:
    kind = options.kind or ("gpu" if passport.device.get("kind") == "gpu" else "cpu")
    if kind not in KINDS:
        raise ServeError(f"unknown instance kind {kind!r}; choose one of {', '.join(KINDS)}")
    return kind


def _tensorrt(groups: Sequence[_Group], options: TritonOptions) -> str | None:
    """The one TensorRT version that all plans need; None without plans."""
    needed = {p.requires.get("tensorrt") for group in groups for p in group.passports if p.backend == "trt"}
    if not needed:
        return None
    if None in needed:
        raise ServeError("a TensorRT engine's passport does not name its TensorRT version; build it again")
    found = sorted(str(version) for version in needed)
    if len(found) > 1:
        raise ServeError(
            f"the engines need TensorRT {' and '.join(found)}, and one container has one; build them alike"
        )
    if options.tensorrt is not None and not same_version(found[0], options.tensorrt):
        raise ServeError(
            f"the engines were built by TensorRT {found[0]}, and the container has "
            f"{options.tensorrt}: it would refuse them; "
            "choose the container with that version, or build the engines in this one"
        )
    return found[0]


def _facts(passport: EnginePassport) -> Mapping[str, Any]:
    return {
        "engine_sha256": passport.engine_sha256,
        "onnx_sha256": passport.onnx_sha256,
        "requires": dict(passport.requires),
        "plan": to_builtins(passport.plan),
    }
