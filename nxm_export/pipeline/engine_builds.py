"""Engine directories are built: one, three twins, or the fastest that agrees with its checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from nxm_export.contract.choices import (
    BACKEND,
    MAX_PROFILES,
    SPARSE_USE,
    TASK,
    TENSORRT_BACKENDS,
)
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS
from nxm_export.data.columns import Columns
from nxm_export.errors import EngineError
from nxm_export.pipeline.engine_comparison import compare_engines
from nxm_export.pipeline.graph_file import onnx_file
from nxm_export.storage.atomic import atomic_dir, require_apart

if TYPE_CHECKING:
    from engines.base import BuildOptions, Profile
    from engines.benchmark.fastest_backend import Choice, Measure
    from engines.passport import EnginePassport
    from nxm_export.pipeline.sparsity_twins import BuiltTwins, TwinGraphs


@dataclass(frozen=True)
class DataProfiles:
    """Optimization profiles, at most `count`, that come from the token lengths of a data file; of a backend that
    compiles shapes, as many of those."""

    data: str
    count: int = MAX_PROFILES
    columns: Columns = Columns()


@dataclass(frozen=True)
class ParityCheck:
    """What an engine must agree with to be kept: a checkpoint, on the labelled samples of a data file."""

    checkpoint: str | Path
    data: str
    columns: Columns = Columns()


@dataclass(frozen=True)
class FastestBuild:
    """The engine that was kept, and how it was chosen."""

    passport: EnginePassport
    choice: Choice


def build_engine(
    source: str | Path,
    out: str | Path,
    name: str = BACKEND,
    options: BuildOptions | None = None,
    *,
    profiles_from: DataProfiles | None = None,
) -> EnginePassport:
    """Build the engine directory `out` from an ONNX file or a graph directory by the backend `name`; its passport is
    returned. Raises `EngineError` for options that this backend would not heed."""
    from engines.base import BuildOptions, backend
    from engines.memory import tell_memory
    from engines.sparsity.build_evidence import LOG_FILE

    source, out, options = onnx_file(source), Path(out), options or BuildOptions()
    require_apart(out, source)
    capabilities = backend(name).CAPABILITIES
    _require_heeded(options, [name], lengths=profiles_from is not None)
    if capabilities.compiled_shapes and profiles_from is not None:
        options = _with_shapes(options, source.parent, profiles_from)
    else:
        options = _build_options(name, options, out, source.parent, profiles_from)
    tell_memory(source, name, options)
    with atomic_dir(out, kept_log=LOG_FILE) as scratch:
        return backend(name).build(source, scratch, options)


def _require_heeded(options: BuildOptions, backends: Sequence[str], *, lengths: bool = False) -> None:
    """Raise `EngineError` for options that none of the backends has a use for: they would be left out without a word.
    `lengths`: profiles are to come from data."""
    from engines.base import backend

    able = [backend(name).CAPABILITIES for name in backends]
    profiles, shapes = any(one.optimization_profiles for one in able), any(one.compiled_shapes for one in able)
    tensorrt, always = any(name in TENSORRT_BACKENDS for name in backends), any(one.always_sparse for one in able)
    unheeded = {
        "shapes (--shape)": bool(options.shapes) and not shapes,
        "threads": options.threads is not None and not any(one.threads for one in able),
        "profiles (--profile, --lengths)": not profiles and (bool(options.profiles) or (lengths and not shapes)),
        "max_batch_tokens": options.max_batch_tokens != MAX_BATCH_TOKENS and not profiles,
        "--sparse never": options.sparse == "never" and not any(one.sparse_kernels for one in able),
        "--sparse always": options.sparse == "always" and not always,
        "no fusion (--no-fuse)": not options.fuse and not always,
        "oldest_onnxruntime (--onnxruntime)": options.oldest_onnxruntime is not None and "ort" not in backends,
        "level": options.level is not None and not tensorrt,
        "workspace_bytes (--workspace)": options.workspace_bytes is not None and not tensorrt,
        "build_route": options.build_route is not None and not tensorrt,
        "timing_cache": options.timing_cache is not None and "trt" not in backends,
    }
    if wrong := [what for what, given in unheeded.items() if given]:
        raise EngineError(f"a build for {' or '.join(backends)} has no use for {', '.join(wrong)}; leave it out")


def build_twin_engines(
    checkpoint: str | Path,
    out: str | Path,
    name: str,
    options: BuildOptions | None = None,
    *,
    profiles_from: DataProfiles | None = None,
    graphs: TwinGraphs | None = None,
) -> BuiltTwins:
    """Export a checkpoint and build its FP16, dense INT8 and sparse INT8 engines below `out`.

    Raises `EngineError` where one of them cannot be built; the others stay then.
    """
    from engines.base import BuildOptions, backend
    from nxm_export.pipeline.sparsity_twins import TwinGraphs, build_twins

    checkpoint, out, options = Path(checkpoint), Path(out), options or BuildOptions()
    require_apart(out, checkpoint)
    if not backend(name).CAPABILITIES.sparse_kernels:
        raise EngineError(f"twins say what sparse kernels are worth, and {name} has none; build them for a GPU")
    if options.sparse != SPARSE_USE:
        raise EngineError(
            f"of twins one has sparse kernels and one has not; leave --sparse {options.sparse} out, or --twins"
        )
    _require_heeded(options, [name], lengths=profiles_from is not None)
    options = _build_options(name, options, out, checkpoint, profiles_from)
    built = build_twins(checkpoint, out, name, options, graphs or TwinGraphs())
    if built.failed:
        reasons = "; ".join(f"{twin} could not be built: {why}" for twin, why in built.failed.items())
        raise EngineError(f"{out} has {', '.join(built.twins)}; {reasons}")
    return built


def _build_options(
    name: str, options: BuildOptions, out: Path, tokenizer: Path, profiles_from: DataProfiles | None
) -> BuildOptions:
    """The options with the timing cache that lies in `out`, for the backend that reads one, and with profiles by the
    tokenizer in a directory."""
    from engines.tensorrt.builder_process import CACHE_FILE

    if name == "trt" and options.timing_cache is None and (out / CACHE_FILE).is_file():
        options = replace(options, timing_cache=out / CACHE_FILE)
    if profiles_from is not None:
        options = replace(options, profiles=_profiles(tokenizer, profiles_from, options.max_batch_tokens))
    return options


def build_fastest(
    source: str | Path,
    out: str | Path,
    options: BuildOptions | None = None,
    *,
    shapes: Sequence[tuple[int, int]] | None = None,
    check: ParityCheck | None = None,
    measure: Measure | None = None,
) -> FastestBuild:
    """Build an ONNX file, or a graph directory's, with every backend that ``auto`` tries, time them, and keep the
    fastest as the engine directory `out`.

    `shapes` are also compiled by backends that can (`BuildOptions.shapes`). With `check` only engines that pass the
    comparison are candidates, and the parity report comes with the engine.
    `measure` times loaded engines (see `engines.benchmark.fastest_backend.choose`); by default
    `engines.benchmark.latency` does. Raises `EngineError` where no engine is left.
    """
    from engines.base import BuildOptions
    from engines.benchmark import fastest_backend
    from engines.passport import load_passport

    source, out, options = onnx_file(source), Path(out), options or BuildOptions()
    _require_heeded(options, fastest_backend.candidates())
    options = replace(options, shapes=tuple(dict.fromkeys((*options.shapes, *(shapes or ())))))
    require_apart(out, source, *([] if check is None else [check.checkpoint, check.data]))
    with atomic_dir(out) as scratch, TemporaryDirectory() as work:
        engines, left_out = fastest_backend.build_candidates(source, Path(work), options)
        if check is not None:
            differing = _differing(check, engines)
            left_out |= differing
            engines = {name: directory for name, directory in engines.items() if name not in differing}
            if not engines:
                raise EngineError(
                    f"{source}: no engine passes the comparison with {check.checkpoint}; run `nxm compare`"
                )
        choice = fastest_backend.choose(engines, left_out, shapes, threads=options.threads, measure=measure)
        shutil.copytree(Path(work) / choice.backend, scratch, dirs_exist_ok=True)
        passport = load_passport(scratch)
        facts = {**choice.to_dict(), "parity": "not checked" if check is None else "passed"}
        passport = replace(passport, options={**passport.options, "auto": facts})
        passport.save(scratch)
    return FastestBuild(passport, choice)


def _differing(check: ParityCheck, engines: Mapping[str, Path]) -> dict[str, str]:
    """Why engine directories, by backend, do not pass the comparison."""
    try:
        comparison = compare_engines(check.checkpoint, list(engines.values()), check.data, check.columns)
    except EngineError as error:
        return dict.fromkeys(engines, f"it could not be compared: {error}")
    reasons = {Path(engine.engine).name: engine.reason for engine in comparison.without_report}
    passed = {Path(report.engine).name for report in comparison.reports if report.passed}
    return {
        name: f"it could not be compared: {reasons[name]}"
        if name in reasons
        else "it does not compute what the checkpoint computes"
        for name in engines
        if name not in passed
    }


def _profiles(directory: Path, source: DataProfiles, batch_tokens: int) -> list[Profile]:
    """Optimization profiles of at most `batch_tokens` from the token lengths of a data file, by the tokenizer of a
    directory."""
    from engines.tensorrt.profiles import profiles_from_lengths

    lengths, limit = _token_lengths(directory, source)
    return profiles_from_lengths(lengths, limit, count=source.count, batch_tokens=batch_tokens)


def _with_shapes(options: BuildOptions, directory: Path, source: DataProfiles) -> BuildOptions:
    """`options` with the shapes of single texts that run most of a data file, beside those that they have."""
    from engines.compiled_shapes import shapes_of_lengths
    from engines.serving.shapes import usual_lengths

    lengths, limit = _token_lengths(directory, source)
    return replace(options, shapes=(*options.shapes, *shapes_of_lengths(lengths, usual_lengths(limit), source.count)))


def _token_lengths(directory: Path, source: DataProfiles) -> tuple[list[int], int]:
    """(tokens of every text of a data file by the tokenizer of a directory, tokens that its model takes at most)."""
    from nxm_export.contract.tasks import task_named
    from nxm_export.data.examples import encode
    from nxm_export.data.label_kinds import LABELS, load_labelled, read_by_model
    from nxm_export.data.tokenization import cut_at, load_tokenizer

    limit, task = _limit_and_task(directory)
    kind = task_named(task)
    raw, tokenizer = load_labelled(source.data, "train", source.columns, kind), load_tokenizer(directory)
    if kind.output_kind == "span":  # as many windows as its contexts take
        windows = encode(tokenizer, LABELS[kind.label].apply(raw, {}), limit, ("input_ids",))
        lengths = [len(window["input_ids"]) for window in windows]
    else:
        cut_at(tokenizer, limit)
        lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(read_by_model(raw, kind))]
    return lengths, limit


def _limit_and_task(directory: Path) -> tuple[int, str]:
    """(longest input in tokens, task) of a graph or checkpoint directory."""
    from nxm_export.contract.checkpoint import read_config, task_at
    from nxm_export.contract.families import family_of
    from nxm_export.contract.io_spec import SPEC_FILE, IOSpec
    from nxm_export.contract.tasks import task_named

    if (directory / SPEC_FILE).is_file():
        spec = load_spec(directory)
    else:  # what its graph will take
        config = read_config(directory)
        task = task_named(task_at(directory, config) or TASK)
        spec = IOSpec.of(directory, config, family_of(config, source=str(directory)), task)
    return spec.max_length, spec.task
