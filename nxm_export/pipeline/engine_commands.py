"""What is done with engine directories: built, compared with their checkpoint, timed, loaded through their servers."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from nxm_export.contract.choices import (
    BACKEND,
    BENCH_ROUNDS,
    BENCH_SHAPES,
    LOWERING,
    MAX_PROFILES,
    TASK,
    TENSORRT_BACKENDS,
    TEXT_BATCH,
    TOKEN_ENCODING,
    WEIGHT_STORAGE,
)
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS
from nxm_export.data.columns import Columns
from nxm_export.data.examples import Examples
from nxm_export.data.features import Features
from nxm_export.data.tokenization import Tokenizer
from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable
from nxm_export.pipeline.graph_file import onnx_file
from nxm_export.pipeline.inspection import sparsity_of
from nxm_export.storage.atomic import atomic_dir, require_apart

if TYPE_CHECKING:
    from engines.base import BuildOptions, Engine, Profile
    from engines.benchmark.fastest_backend import Choice, Measure
    from engines.benchmark.http_load import LoadReport
    from engines.benchmark.latency import BenchReport
    from engines.benchmark.text_throughput import TextReport
    from engines.parity.bisect_reports import BisectReport
    from engines.parity.reports import Comparison
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
        "no sparse kernels (--no-sparse)": not options.sparse and not any(one.sparse_kernels for one in able),
        "always_sparse": options.always_sparse and not always,
        "no fusion (--no-fuse)": not options.fuse and not always,
        "oldest_onnxruntime (--onnxruntime)": options.oldest_onnxruntime is not None and "ort" not in backends,
        "level": options.level is not None and not tensorrt,
        "workspace_bytes (--workspace)": options.workspace_bytes is not None and not tensorrt,
        "build_route": options.build_route is not None and not tensorrt,
        "timing_cache": options.timing_cache is not None and "trt" not in backends,
    }
    if wrong := [what for what, given in unheeded.items() if given]:
        raise EngineError(f"a build for {' or '.join(backends)} has no use for {', '.join(wrong)}; leave it out")
    if options.always_sparse and not options.sparse:
        raise EngineError("always_sparse and no sparse kernels contradict each other; give one of them")


def build_twin_engines(
    checkpoint: str | Path,
    out: str | Path,
    name: str,
    options: BuildOptions | None = None,
    *,
    profiles_from: DataProfiles | None = None,
    graphs: TwinGraphs | None = None,
) -> BuiltTwins:
    """Export a checkpoint and build its FP16, dense INT8 and sparse INT8 engines below `out`."""
    from engines.base import BuildOptions, backend
    from nxm_export.pipeline.sparsity_twins import TwinGraphs, build_twins

    checkpoint, out, options = Path(checkpoint), Path(out), options or BuildOptions()
    require_apart(out, checkpoint)
    if not backend(name).CAPABILITIES.sparse_kernels:
        raise EngineError(f"twins say what sparse kernels are worth, and {name} has none; build them for a GPU")
    if not options.sparse:
        raise EngineError("of twins one has sparse kernels and one has not; leave --no-sparse out, or --twins")
    _require_heeded(options, [name], lengths=profiles_from is not None)
    options = _build_options(name, options, out, checkpoint, profiles_from)
    return build_twins(checkpoint, out, name, options, graphs or TwinGraphs())


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
            comparison = compare_engines(check.checkpoint, list(engines.values()), check.data, check.columns)
            passed = {Path(report.engine).name for report in comparison.reports if report.passed}
            skipped = {Path(engine.engine).name: engine.reason for engine in comparison.skipped}
            for name in [name for name in engines if name not in passed]:
                engines.pop(name)
                why = "it does not compute what the checkpoint computes"
                left_out[name] = f"it could not be compared: {skipped[name]}" if name in skipped else why
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


def compare_engines(
    checkpoint: str | Path,
    engines: Sequence[str | Path],
    data: str,
    columns: Columns = Columns(),
    gates: Sequence[str] = (),
) -> Comparison:
    """Compare engine directories with the checkpoint and with each other on one labelled data file: a report of each,
    and the reason where one cannot run here.

    `gates` are such as ``drop<=0.5`` (see `engines.parity.gates`).
    """
    from engines.parity.compare import compare_all
    from engines.parity.gates import parse_gate

    parsed = [parse_gate(gate) for gate in gates]
    features, numbered = _shared_features(engines, data, columns)
    return compare_all(checkpoint, engines, features, gates=parsed, numbered=numbered)


def bisect_engines(
    checkpoint: str | Path, engines: Sequence[str | Path], data: str, columns: Columns = Columns()
) -> list[BisectReport]:
    """Find the first block where each engine parts from the checkpoint in PyTorch; a report each.

    Engines are built again with the blocks' outputs as graph outputs; those of TensorRT from a new export of the
    checkpoint.
    """
    from engines.base import backend
    from engines.parity.bisect import bisect
    from engines.passport import load_passport

    (features, _), reports = _shared_features(engines, data, columns), []
    for engine in map(Path, engines):
        passport = load_passport(engine)
        if backend(passport.backend).CAPABILITIES.runs_onnx:
            reports.append(bisect(checkpoint, engine, features, graph=engine / passport.engine))
            continue
        with TemporaryDirectory() as scratch:
            graph = _export_again(Path(checkpoint), engine, Path(scratch) / "graph")
            reports.append(bisect(checkpoint, engine, features, graph=graph))
    return reports


def _export_again(checkpoint: Path, engine: Path, out: Path) -> Path:
    """The graph that an engine was built from, made again; raises `ArtifactError` if it becomes another."""
    from engines.passport import load_passport
    from nxm_export.graph.exporter import export
    from nxm_export.graph.external_data import graph_files
    from nxm_export.graph.reading.graph_weights import load_graph

    passport, spec = load_passport(engine), load_spec(engine)
    facts = passport.graph
    dtype = facts.get("dtype")
    overrides = facts.get("precision_overrides", facts.get("islands"))  # "islands" in graphs of nxm-onnx/1
    made = export(
        checkpoint,
        out,
        target=facts.get("target", "trt"),
        task=spec.task,
        dtype=dtype,
        placement=facts.get("placement") if passport.plan else None,
        lowering=facts.get("lowering", LOWERING) if passport.plan else LOWERING,
        precision_overrides=None if overrides == dtype else overrides,
        max_length=spec.max_length,
        weights_stored=facts.get("weights_stored", WEIGHT_STORAGE),
    ).path
    if graph_files(load_graph(made), made).sha256 != passport.onnx_sha256:
        raise ArtifactError(
            f"{engine}: a new export of {checkpoint} is not the graph that it was built from (another version of a "
            "library, or other weights), so its blocks cannot be compared; build the engine from a new export and "
            "bisect that"
        )
    return made


def _shared_features(engines: Sequence[str | Path], data: str, columns: Columns) -> tuple[list[Features], bool]:
    """(the data in tokens, as all of `engines` take it; whether its labels are numbers that are taken for those of
    their classes); `ArtifactError` where their tokenizers differ."""
    directories = [Path(engine) for engine in engines]
    limit = min(load_spec(directory).max_length for directory in directories)
    read = [_labelled_texts(directory, data, columns, limit) for directory in directories]
    first, *rest = [texts.tokens() for texts in read]
    for directory, features in zip(directories[1:], rest, strict=True):
        if features != first:
            raise ArtifactError(
                f"{directory} reads the data in other tokens or labels than {directories[0]}; they cannot be compared "
                "with each other: build both from one checkpoint, or compare them one by one"
            )
    return first, read[0].numbered


def bench_engines(
    engines: Sequence[str | Path],
    shapes: Sequence[tuple[int, int]] | None = None,
    rounds: int = BENCH_ROUNDS,
    threads: int | None = None,
) -> BenchReport:
    """Time engine directories (a twins directory stands for its three) against each other, at `shapes` of (batch,
    sequence); without any at `BENCH_SHAPES`, with the batch or length that the engines have fixed, and no longer than
    their models take.

    Engines that this machine cannot run are named in the report with the reason, unless none is left.
    """
    from engines.base import LoadOptions, backend
    from engines.benchmark.latency import bench, fitted_shapes
    from engines.memory import require_room
    from engines.passport import load_passport, running_on
    from nxm_export.pipeline.sparsity_twins import is_twins, twin_directories

    given = [Path(path) for path in engines]
    paths = [part for path in given for part in (twin_directories(path) if is_twins(path) else [path])]
    if len({path.resolve() for path in paths}) < len(paths):
        raise EngineError("the same engine is given twice; copy its directory to time it against itself")
    passports = {path: load_passport(path) for path in paths}
    unmeasured: dict[str, str] = {}
    twins: dict[str, tuple[str, Path]] = {}
    with ExitStack() as stack:
        loaded: dict[str, Engine] = {}
        for path, name in zip(paths, _names(paths), strict=True):
            try:
                runtime = backend(passports[path].backend)
                loaded[name] = stack.enter_context(runtime.load(path, LoadOptions(threads)))
            except EngineUnavailable as error:
                unmeasured[name] = str(error)
            else:
                if twin := passports[path].twin:
                    twins[twin] = (name, path)
        if not loaded:
            raise EngineUnavailable(f"nothing could be timed here: {'; '.join(dict.fromkeys(unmeasured.values()))}")
        # Each once: a table by shape would hold the time of one round against that of the other.
        shapes = tuple(dict.fromkeys(shapes or fitted_shapes(loaded.values(), _default_shapes(paths))))
        for path, name in zip(paths, _names(paths), strict=True):
            if name in loaded:
                require_room(path, shapes, "timing it at", way_out="give a --shape of fewer rows or shorter texts")
        report = bench(loaded, shapes, rounds=rounds, vocabulary=_vocabulary(paths))
    absent = tuple(f"{name}: {why}" for name, why in unmeasured.items())
    measured = [passports[path] for path, name in zip(paths, _names(paths), strict=True) if name not in unmeasured]
    verdict = _verdict(report, twins, passports)
    return replace(report, verdict=verdict, unmeasured=absent, machine=running_on(measured[0]))


def _default_shapes(engines: Sequence[Path]) -> list[tuple[int, int]]:
    """`BENCH_SHAPES`, no longer than the shortest of the engines' longest inputs."""
    from engines.base import spec_of

    specs = [spec for spec in map(spec_of, engines) if spec is not None]
    return [(batch, min([sequence, *(spec.max_length for spec in specs)])) for batch, sequence in BENCH_SHAPES]


def _names(paths: Sequence[Path]) -> list[str]:
    """The directories' own names, or their paths where two have the same name."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _verdict(
    report: BenchReport, twins: Mapping[str, tuple[str, Path]], passports: Mapping[Path, EnginePassport]
) -> str | None:
    """Whether 2:4 pays on this GPU, where both INT8 twins were timed; `twins` are (name, directory) by their part."""
    from engines.benchmark.latency import sparse_verdict
    from engines.sparsity.engine_report import twin_problem
    from nxm_export.pipeline.sparsity_twins import DENSE, SPARSE

    if DENSE not in twins or SPARSE not in twins:
        return None
    (dense, other), (sparse, path) = twins[DENSE], twins[SPARSE]
    if (problem := twin_problem(passports[other], passports[path])) is not None:
        return f"no verdict: {other} is no dense twin of {path}: {problem}"
    gpu, found = passports[path].device.get("gpu", "this GPU"), sparsity_of(path)
    # Evidence that says nothing of these products is not evidence that 2:4 does nothing for them.
    mute = [weight for weight in found.weights if weight.planned_sparse and weight.reason in ("untied", "ambiguous")]
    if found.sparse_share == 0 and mute:
        return f"no verdict: which kernels {path} runs is not known: {mute[0].detail}"
    return sparse_verdict(report, sparse, dense, found.sparse_share, gpu)


def bench_text(
    engines: Sequence[str | Path],
    data: str,
    *,
    batch: int | None = None,
    rounds: int | None = None,
    threads: int | None = None,
    columns: Columns = Columns(),
    others: Mapping[str, Callable[[], float]] | None = None,
) -> TextReport:
    """Sentences a second of CPU engine directories over the text of a data file.

    All engines must read the text in the same tokens and give one answer a sentence. Those that can are loaded a second
    time, for throughput. `others` are timed between them
    (see `engines.benchmark.text_throughput`).
    """
    from engines.base import LoadOptions, backend, cpu_backends
    from engines.benchmark import text_throughput
    from engines.memory import require_room
    from engines.passport import load_passport

    paths, batch = [Path(path) for path in engines], TEXT_BATCH if batch is None else batch
    for path in paths:
        name = load_passport(path).backend
        if name not in cpu_backends():
            raise EngineError(
                f"{path}: text is timed on CPU engines ({', '.join(cpu_backends())}), and this is of {name}"
            )
        if any("sequence" in axes for axes in load_spec(path).outputs.values()):
            raise EngineError(f"{path}: it has an answer for every token; text is timed for one answer a sentence")
    features, _ = _shared_features(paths, data, columns)
    limit = min(load_spec(path).max_length for path in paths)
    longest = max([min(text_throughput.FIXED, limit), *(len(sample["input_ids"]) for sample in features)])
    for path in paths:  # batches in the order of the file hold as many long texts as there are
        shape = (max(1, min(batch, len(features))), longest)
        require_room(path, [shape], "timing it at", way_out="lower --batch, or time it over shorter texts")
    with ExitStack() as stack:
        loaded = {
            name: stack.enter_context(backend(load_passport(path).backend).load(path, LoadOptions(threads)))
            for name, path in zip(_names(paths), paths, strict=True)
        }
        for_throughput = {
            name: stack.enter_context(
                backend(load_passport(path).backend).load(path, LoadOptions(threads, hint="throughput"))
            )
            for name, path in zip(_names(paths), paths, strict=True)
            if backend(load_passport(path).backend).CAPABILITIES.throughput
        }
        return text_throughput.bench_text(
            loaded,
            _labelled_texts(paths[0], data, columns, limit).tokens,
            pad_id=load_spec(paths[0]).pad_id,
            limit=limit,
            batch=batch,
            rounds=text_throughput.ROUNDS if rounds is None else rounds,
            for_throughput=for_throughput,
            others=others or {},
        )


@dataclass(frozen=True)
class _LabelledTexts:
    """The examples of a data file, and how an engine makes tokens of them. `numbered`: their labels are numbers, which
    are taken for those of its classes."""

    examples: Examples
    tokenizer: Tokenizer
    length: int
    inputs: tuple[str, ...]
    numbered: bool

    def tokens(self) -> list[Features]:
        """The samples."""
        from nxm_export.data.examples import encode

        return encode(self.tokenizer, self.examples, self.length, self.inputs)


def _labelled_texts(directory: Path, data: str, columns: Columns, limit: int) -> _LabelledTexts:
    """A data file, read with the tokenizer and labels of a graph or engine directory."""
    from engines.passport import PASSPORT_FILE, covered_spec, covered_tokenizer, load_passport
    from nxm_export.contract.tasks import TASKS
    from nxm_export.data.label_kinds import classes_of, labelled, load_labelled
    from nxm_export.data.question_answering import answering
    from nxm_export.data.tokenization import load_tokenizer

    passport = load_passport(directory) if (directory / PASSPORT_FILE).is_file() else None
    spec = load_spec(directory) if passport is None else covered_spec(directory, passport)
    task = TASKS[spec.task]
    raw = load_labelled(data, "dev", columns, task, spec.labels)
    classes = classes_of(raw, task, spec.labels)
    numbered = classes is not None and classes.numbered
    tokenizer = load_tokenizer(directory) if passport is None else covered_tokenizer(directory, passport)
    length = min(limit, spec.max_length)
    examples = answering(labelled(raw, task, classes), spec.no_answer_threshold)
    return _LabelledTexts(examples, tokenizer, length, spec.inputs, numbered)


def _vocabulary(engines: Sequence[Path]) -> int | None:
    """Token ids below this exist in every engine; None where one has no spec that says so."""
    from engines.base import spec_of
    from engines.benchmark.latency import VOCABULARY

    specs = [spec_of(path) for path in engines]
    known = [spec.limits.get("input_ids", VOCABULARY) for spec in specs if spec is not None]
    return min([VOCABULARY, *known]) if len(known) == len(specs) else None


@dataclass(frozen=True)
class LoadRequests:
    """What servers are asked: the samples of a data file, in an order that is shuffled once.

    With an `engine` directory they are sent as tokens of its tokenizer in an `encoding` (``binary`` or ``json``), else
    as text: what a model of `task` reads, a text or a pair of texts a request.
    """

    data: str
    engine: Path | None = None
    encoding: str = TOKEN_ENCODING
    task: str = TASK


@dataclass(frozen=True)
class LoadRounds:
    """How servers are loaded: with each number of `clients` at once, for `seconds` a round."""

    clients: Sequence[int]
    seconds: float
    rounds: int


def load_servers(urls: Sequence[str], model: str, requests: LoadRequests, load: LoadRounds) -> LoadReport:
    """Load running servers that have the model of this name with requests, and time their answers."""
    from engines.benchmark.http_load import measure, with_text, with_tokens
    from nxm_export.contract.tasks import task_named
    from nxm_export.data.label_kinds import load_labelled, read_by_model

    if requests.engine is None:
        task = task_named(requests.task)
        texts = read_by_model(load_labelled(requests.data, "dev", Columns(), task), task)
        texts = random.Random(0).sample(texts, len(texts))
        targets = [with_text(url, url, model, texts) for url in urls]
    else:
        features = features_of(requests.engine, requests.data, Columns())
        features = random.Random(0).sample(features, len(features))
        spec = load_spec(requests.engine)
        targets = [with_tokens(url, url, model, features, spec, encoding=requests.encoding) for url in urls]
    return measure(targets, load.clients, seconds=load.seconds, rounds=load.rounds)


def features_of(directory: Path, data: str, columns: Columns, limit: int | None = None) -> list[Features]:
    """A labelled data file in tokens (at most `limit`), by the tokenizer and labels of a graph or engine directory."""
    return _labelled_texts(directory, data, columns, limit or load_spec(directory).max_length).tokens()
