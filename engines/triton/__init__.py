"""Hand engine directories over to Triton: a model repository that it loads as it is, and what deploys it.

::

    REPO/NAME/config.pbtxt, REPO/NAME/1/model.onnx or model_sm80.plan ...    the engine (one plan a compute capability)
    REPO/NAME_tokenizer/, REPO/NAME_labels/, REPO/NAME_text/                 sentences in, class names out (optional);
                                                                             NAME_answers/ for answers to questions
    REPO/manifest.json, REPO/check_manifest.py                               hashes, and the TensorRT that plans need
    REPO/Dockerfile, REPO/compose.yaml, REPO/kserve.yaml                     containers; Triton ignores files up here

The same client code works on `nxm serve` and on Triton: same protocol, model names, inputs and outputs.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from engines.admission import admitted
from engines.ort.backend import notice_runtime
from engines.ort.session_levels import SessionLevel, closest_level
from engines.passport import EnginePassport, PlanSummary, companion_hashes, covered_spec
from engines.serving import long_texts
from engines.serving.model import require_labelled
from engines.serving.repository import EngineSource, require_distinct_names
from engines.serving.settings import TritonOptions
from engines.serving.shapes import plan_buckets
from engines.serving.text import ANSWER, LABEL, PAIR, TEXT, names_classes
from engines.triton.check_manifest import MANIFEST, SCHEMA, same_version
from engines.triton.config import BACKENDS, KINDS, Instances, LastStep, engine_config, text_configs
from engines.triton.deploy import deployment_files, object_name
from nxm_export.contract.io_spec import TOKENIZER_FILE, IOSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.contract.token_budget import rows_within
from nxm_export.data import answer_spans
from nxm_export.data.tokenization import parse_tokenizer
from nxm_export.errors import ArtifactError, ServeError
from nxm_export.storage.atomic import atomic_dir, require_apart
from nxm_export.storage.hashing import file_hash, file_hashes
from nxm_export.storage.json_files import encode, to_json_object

TEXT_SCHEMA = "nxm-triton-text/1"
LABELS_SCHEMA = "nxm-triton-labels/1"
ANSWERS_SCHEMA = "nxm-triton-answers/1"
ANSWERS = LastStep("_answers", ANSWER, tuple(TASKS["question-answering"].outputs), texts=True)
VERSION = "1"
TEXT_SUFFIXES = ("_text", "_tokenizer", "_labels", "_answers")  # of the models that --text adds to one
CHECK = "check_manifest.py"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class EngineFacts:
    """What a manifest records about one engine; the words are those of its passport. `session` is how its ONNX Runtime
    session in Triton stands to the proven one, None for other engines."""

    engine_sha256: str
    contents_sha256: str | None
    onnx_sha256: str
    requires: Mapping[str, str]
    plan: PlanSummary | None
    session: SessionLevel | None


@dataclass(frozen=True)
class TritonManifest:
    """What a repository was made of, and the sha256 of every file that Triton loads. `tensorrt` is the version that its
    plans need, None without plans. `engines.triton.check_manifest` reads it, in the container."""

    image: str
    tensorrt: str | None
    models: Mapping[str, Sequence[EngineFacts]]
    files: Mapping[str, str]

    def to_dict(self) -> dict[str, object]:
        """The form of ``manifest.json`` and ``--json``."""
        return {"schema": SCHEMA, **to_json_object(self)}


@dataclass(frozen=True)
class _Model:
    """Engine directories that are one model: one, or several for different compute capabilities."""

    name: str
    directories: tuple[Path, ...]
    passports: tuple[EnginePassport, ...]
    spec: IOSpec
    session: SessionLevel | None


def export_repository(
    sources: Sequence[EngineSource], out: Path | str, options: TritonOptions = TritonOptions()
) -> TritonManifest:
    """Write the repository `out` and return its manifest; `sources` of one name are one model for several GPUs.

    An existing `out` is replaced if it is a repository of ours. Raises `ServeError` for engines that Triton cannot
    load, `ArtifactError` for damaged ones.
    """
    out, options = Path(out), replace(options, text=options.text or options.pair)  # pairs are texts, too
    require_distinct_names(sources, TEXT_SUFFIXES if options.text else (), folded=True)
    served = [_model_of(name, sources, options) for name in dict.fromkeys(source.name for source in sources)]
    if not served:
        raise ServeError("nothing to hand over: give at least one engine directory")
    if out.is_dir() and any(out.iterdir()) and not (out / CHECK).is_file():  # an engine directory, for example
        raise ArtifactError(f"{out} exists and is no repository of ours (no {CHECK}); choose another --out")
    require_apart(out, *(directory for model in served for directory in model.directories))
    tensorrt = _tensorrt(served, options)
    with atomic_dir(out) as scratch:
        for model in served:
            _write_model(scratch, model, options)
        gpu = any(_kind(model.passports[0], options) == "gpu" for model in served)
        models = sorted(path.name for path in scratch.iterdir())
        manifest = TritonManifest(
            image=options.image,
            tensorrt=tensorrt,
            models={model.name: [_facts(p, model.session) for p in model.passports] for model in served},
            files=file_hashes(scratch),
        )
        (scratch / MANIFEST).write_text(encode(manifest, SCHEMA), encoding="utf-8")
        shutil.copyfile(_HERE / CHECK, scratch / CHECK)
        tag = f"{object_name(served[0].name)}:{file_hash(scratch / MANIFEST)[:12]}"
        for name, text in deployment_files(
            served[0].name, tag, models, options.image, text=options.text, gpu=gpu
        ).items():
            (scratch / name).write_text(text, encoding="utf-8")
    return manifest


def _model_of(name: str, sources: Sequence[EngineSource], options: TritonOptions) -> _Model:
    directories = tuple(source.directory for source in sources if source.name == name)
    passports = tuple(admitted(directory, options.gate, options.expect_sha256) for directory in directories)
    for directory, passport in zip(directories, passports, strict=True):
        passport.notice_coverage(directory)
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
        for directory in directories[1:]:
            if companion_hashes(directory) != companion_hashes(directories[0]):
                raise ServeError(
                    f"{name}: {directory} has other labels or another tokenizer than {directories[0]}; build all of "
                    "them from one graph directory"
                )
    spec = covered_spec(directories[0], first)
    session = None
    if first.backend == "ort":
        notice_runtime(directories[0], first)
        session = closest_level(directories[0], first, spec, kind=_kind(first, options))
    return _Model(name, directories, passports, spec, session)


def _write_model(repository: Path, model: _Model, options: TritonOptions) -> None:
    first, spec = model.passports[0], model.spec
    version = repository / model.name / VERSION
    version.mkdir(parents=True)
    files: dict[str, str] = {}
    default = BACKENDS[first.backend][2]
    for directory, passport in zip(model.directories, model.passports, strict=True):
        capability = str(passport.device.get("compute_capability", "")) if first.backend == "trt" else ""
        files[capability] = default if not capability else f"model_sm{capability.replace('.', '')}.plan"
        data = passport.read_engine(directory, passport.requires)  # the machine it runs on is checked there, not here
        (version / files[capability]).write_bytes(data)
    kind = _kind(first, options)
    instances = Instances(kind, options.instances, options.threads)
    config = engine_config(
        model.name, first, spec, instances, max_batch=_rows(model, options), files=files, session=model.session
    )
    names = {binding.name for binding in first.tensors("inputs")}
    if names != set(spec.inputs):
        raise ServeError(
            f"{model.name}: spec.json has the inputs {', '.join(spec.inputs)}, and the engine takes "
            f"{', '.join(sorted(names))}; build it again"
        )
    require_labelled(model.directories[0], spec, first.tensors("outputs")[0].shape)
    (repository / model.name / "config.pbtxt").write_text(config, encoding="utf-8")
    if options.text:
        _write_text_frontend(repository, model, options)


def _write_text_frontend(repository: Path, model: _Model, options: TritonOptions) -> None:
    first, spec, directory = model.passports[0], model.spec, model.directories[0]
    text = first.read_companion(directory, TOKENIZER_FILE)
    if text is None:
        raise ArtifactError(
            f"{directory} has no {TOKENIZER_FILE}, which --text needs; put it beside the graph and build again"
        )
    parse_tokenizer(text, directory / TOKENIZER_FILE)  # what cannot be read is refused here, not in the container
    wants = TASKS[spec.task].texts
    if options.pair and wants == "one":
        raise ServeError(f"{directory}: {spec.task} reads one text at a time; use --text, not --pairs")
    last = _last_step(spec, [binding.name for binding in first.tensors("outputs")])
    buckets = plan_buckets(
        spec.max_length, options.max_batch, first.profiles, max_batch_tokens=options.max_batch_tokens
    )
    texts = {TEXT: False} if wants == "one" else {TEXT: False, PAIR: wants == "any" and not options.pair}
    configs = text_configs(model.name, first, max_batch=_rows(model, options), texts=texts, last=last)
    for name, config in configs.items():
        (repository / name / VERSION).mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(config, encoding="utf-8")
    tokenizer = repository / f"{model.name}_tokenizer" / VERSION
    _copy_code(tokenizer, "tokenizer_model.py", long_texts, *([answer_spans] if last is ANSWERS else []))
    (tokenizer / TOKENIZER_FILE).write_bytes(text.encode("utf-8"))
    longest = min(spec.max_length, buckets.longest.length)
    settings = {
        "inputs": {binding.name: binding.dtype for binding in first.tensors("inputs")},
        "lengths": [bucket.length for bucket in buckets.buckets],
        "max_length": longest,
        "pad_id": spec.pad_id,
        "texts": list(texts),
        "answers": last is ANSWERS,
    }
    (tokenizer / "text.json").write_text(encode(settings, TEXT_SCHEMA), encoding="utf-8")
    if last is None:
        return
    words = repository / f"{model.name}{last.suffix}" / VERSION
    if last is ANSWERS:
        _copy_code(words, "answers_model.py", answer_spans)
        (words / TOKENIZER_FILE).write_bytes(text.encode("utf-8"))
        rule = {
            "outputs": last.reads,
            "texts": list(texts),
            "max_length": longest,
            "no_answer_threshold": spec.no_answer_threshold,
        }
        (words / "answers.json").write_text(encode(rule, ANSWERS_SCHEMA), encoding="utf-8")
    else:
        _copy_code(words, "labels_model.py")
        names = {"output": last.reads[0], "labels": list(spec.labels)}
        (words / "labels.json").write_text(encode(names, LABELS_SCHEMA), encoding="utf-8")


def _last_step(spec: IOSpec, outputs: Sequence[str]) -> LastStep | None:
    """What says in words what the engine found; None where numbers are all there is."""
    if TASKS[spec.task].output_kind == "span":
        return ANSWERS
    return LastStep("_labels", LABEL, (outputs[0],)) if names_classes(spec) else None


def _copy_code(version: Path, model: str, *modules: ModuleType) -> None:
    """Put a model of the Python backend, and modules that stand alone beside it, into a version's directory."""
    shutil.copyfile(_HERE / model, version / "model.py")
    for module in modules:
        shutil.copyfile(str(module.__file__), version / Path(str(module.__file__)).name)


def _rows(model: _Model, options: TritonOptions) -> int:
    """Rows of a batch at most: Triton has one number for all lengths, so the longest decides where no profile does."""
    if model.passports[0].profiles:
        return options.max_batch
    return rows_within(model.spec.max_length, options.max_batch_tokens, options.max_batch)


def _kind(passport: EnginePassport, options: TritonOptions) -> str:
    kind = options.kind or ("gpu" if passport.device.get("kind") == "gpu" else "cpu")
    if kind not in KINDS:
        raise ServeError(f"unknown instance kind {kind!r}; choose one of {', '.join(KINDS)}")
    return kind


def _tensorrt(served: Sequence[_Model], options: TritonOptions) -> str | None:
    """The one TensorRT version that all plans need; None without plans."""
    needed = {p.requires.get("tensorrt") for model in served for p in model.passports if p.backend == "trt"}
    if not needed:
        return None
    if None in needed:
        raise ServeError("a TensorRT engine's passport does not name its TensorRT version; build it again")
    versions = sorted(str(version) for version in needed)
    if len(versions) > 1:
        raise ServeError(
            f"the engines need TensorRT {' and '.join(versions)}, and one container has one; build them alike"
        )
    if options.tensorrt is not None and not same_version(versions[0], options.tensorrt):
        raise ServeError(
            f"the engines were built by TensorRT {versions[0]}, and the container has "
            f"{options.tensorrt}: it would refuse them; "
            "choose the container with that version, or build the engines in this one"
        )
    return versions[0]


def _facts(passport: EnginePassport, session: SessionLevel | None) -> EngineFacts:
    return EngineFacts(
        passport.engine_sha256,
        passport.contents_sha256,
        passport.onnx_sha256,
        dict(passport.requires),
        passport.plan,
        session,
    )
