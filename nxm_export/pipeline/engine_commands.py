"""What is done with engine directories: build them, compare them with their checkpoint, time them, load their servers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nxm_export.contract.io_spec import load_spec
from nxm_export.data.examples import Columns
from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable
from nxm_export.pipeline.inspection import sparsity_of
from nxm_export.storage.atomic import atomic_dir
from nxm_export.storage.hashing import file_hash

if TYPE_CHECKING:
    from engines.base import BuildOptions

SHAPES = ((1, 32), (8, 64))  # (batch, sequence) that are timed unless others are given


def build_engine(
    source: str | Path,
    out: str | Path,
    name: str = "ort",
    options: BuildOptions | None = None,
    *,
    lengths: str | None = None,
    profiles: int = 3,
    columns: Columns = Columns(),
    twins: bool = False,
    export_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build an engine directory from an ONNX file, or, with `twins`, three of them from a checkpoint directory.

    With `lengths` (a data file) the optimization profiles, at most `profiles`, come from its token lengths. Returns the
    facts of the passport, or of the twins.
    """
    from engines.base import BuildOptions, backend
    from engines.tensorrt.builder_process import CACHE_FILE
    from nxm_export.pipeline.sparsity_twins import TwinGraphs, build_twins

    source, out, options = Path(source), Path(out), options or BuildOptions()
    if options.timing_cache is None and (out / CACHE_FILE).is_file():  # of the engine that is built anew
        options = replace(options, timing_cache=out / CACHE_FILE)
    if lengths is not None:
        options = replace(options, profiles=_profiles(source if twins else source.parent, lengths, profiles, columns))
    if twins:
        return build_twins(source, out, name, options, TwinGraphs(**(export_options or {}))).to_dict()
    with atomic_dir(out) as scratch:
        passport = backend(name).build(source, scratch, options)
    return passport.to_dict()


def build_fastest(
    source: str | Path,
    out: str | Path,
    options: BuildOptions | None = None,
    *,
    shapes: Sequence[tuple[int, int]] | None = None,
    checkpoint: str | Path | None = None,
    data: str | None = None,
    columns: Columns = Columns(),
    measure: Any = None,
) -> tuple[dict[str, Any], Any]:
    """Build an ONNX file with every CPU backend, time them and keep the fastest; (facts of its passport, `Choice`).

    With `checkpoint` and `data` only engines that pass `nxm compare` are candidates, and the parity report comes with the
    engine. `measure` times loaded engines (see `engines.benchmark.fastest_backend.choose`); by default they are timed by `engines.benchmark.latency`.
    """
    from engines.base import BuildOptions
    from engines.benchmark import fastest_backend
    from engines.passport import load_passport

    source, out, options = Path(source), Path(out), options or BuildOptions()
    with atomic_dir(out) as scratch, TemporaryDirectory() as work:
        engines, left_out = fastest_backend.build_candidates(source, Path(work), options)
        checked = checkpoint is not None and data is not None
        if checkpoint is not None and data is not None:
            for report in compare_engines(checkpoint, list(engines.values()), data, columns).reports:
                if not report.passed:
                    name = Path(report.engine).name
                    engines.pop(name)
                    left_out[name] = "it does not compute what the checkpoint computes"
            if not engines:
                raise EngineError(f"{source}: no engine passes the comparison with {checkpoint}; run `nxm compare`")
        choice = fastest_backend.choose(engines, left_out, shapes, threads=options.threads, measure=measure)
        kept = Path(work) / choice.backend
        shutil.copytree(kept, scratch, dirs_exist_ok=True)
        passport = load_passport(scratch)
        facts = {**choice.to_dict(), "parity": "passed" if checked else "not checked"}
        passport = replace(passport, options={**passport.options, "auto": facts})
        passport.save(scratch)
    return passport.to_dict(), choice


def _profiles(directory: Path, data: str, count: int, columns: Columns) -> list[Any]:
    """Optimization profiles from the token lengths of a data file, by the tokenizer of a graph or checkpoint directory."""
    from engines.tensorrt.profiles import profiles_from_lengths
    from nxm_export.contract.families import family_of
    from nxm_export.contract.io_spec import SPEC_FILE
    from nxm_export.contract.tasks import task_named
    from nxm_export.data.examples import encode, load_tokenizer
    from nxm_export.data.label_kinds import LABELS, load_labelled, read_by_model

    if (directory / SPEC_FILE).is_file():
        spec = load_spec(directory)
        limit, task = spec.max_length, spec.task
    else:
        from nxm_export.contract.checkpoint import read_config, task_at

        config = read_config(directory)
        limit = family_of(config, source=str(directory)).max_positions(config)
        task = task_at(directory, config) or "classification"
    raw, tokenizer = load_labelled(data, "train", columns, task_named(task)), load_tokenizer(directory)
    examples = LABELS[task_named(task).label].apply(raw, ()) if task_named(task).output_kind == "span" else None
    if examples is not None:  # as many windows as its contexts take
        found = encode(tokenizer, examples, limit, ("input_ids",))
        return profiles_from_lengths([len(sample["input_ids"]) for sample in found], limit, count=count)
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    rows = read_by_model(raw, task_named(task))
    return profiles_from_lengths([len(found.ids) for found in tokenizer.encode_batch(rows)], limit, count=count)


def compare_engines(
    checkpoint: str | Path,
    engines: Sequence[str | Path],
    data: str,
    columns: Columns = Columns(),
    gates: Sequence[str] = (),
) -> Any:
    """Compare engine directories with the checkpoint and with each other on one labelled data file; returns a
    `Comparison`: a `ParityReport` of each, and the reason where one cannot run here.

    `gates` are such as ``drop<=0.5`` (see `engines.parity.gates`).
    """
    from engines.parity.compare import compare_all
    from engines.parity.gates import parse_gate

    wanted = [parse_gate(gate) for gate in gates]
    return compare_all(checkpoint, engines, _shared_features(engines, data, columns), gates=wanted)


def bisect_engines(
    checkpoint: str | Path, engines: Sequence[str | Path], data: str, columns: Columns = Columns()
) -> list[Any]:
    """Find the first block where each engine parts from the checkpoint in PyTorch; one `BisectReport` each.

    Engines are built again with the blocks' outputs as graph outputs; those of TensorRT from a new export of the checkpoint.
    """
    from engines.base import backend
    from engines.parity.bisect import bisect
    from engines.passport import load_passport

    features, reports = _shared_features(engines, data, columns), []
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
    """The graph that an engine was built from, made again as its passport says; `ArtifactError` if it becomes another."""
    from engines.passport import load_passport
    from nxm_export.graph.exporter import export

    passport, spec = load_passport(engine), load_spec(engine)
    facts = passport.graph
    dtype = facts.get("dtype")
    overrides = facts.get("precision_overrides")
    made = export(
        checkpoint,
        out,
        target=facts.get("target", "trt"),
        task=spec.task,
        dtype=dtype,
        placement=facts.get("placement") if passport.plan else None,
        lowering=facts.get("lowering", "matmul") if passport.plan else "matmul",
        precision_overrides=None if overrides == dtype else overrides,
        max_length=spec.max_length,
    ).path
    if file_hash(made) != passport.onnx_sha256:
        raise ArtifactError(
            f"{engine}: a new export of {checkpoint} is not the graph that it was built from (another version of a library, or "
            "other weights), so its blocks cannot be compared; build the engine from a new export and bisect that"
        )
    return made


def _shared_features(engines: Sequence[str | Path], data: str, columns: Columns) -> list[Any]:
    """The data in tokens, as all of `engines` take it; `ArtifactError` where their tokenizers differ."""
    directories = [Path(engine) for engine in engines]
    limit = min(load_spec(directory).max_length for directory in directories)
    first, *rest = [features_of(directory, data, columns, limit) for directory in directories]
    for directory, found in zip(directories[1:], rest, strict=True):
        if found != first:
            raise ArtifactError(
                f"{directory} reads the data in other tokens or labels than {directories[0]}; they cannot be compared with each "
                "other: build both from one checkpoint, or compare them one by one"
            )
    return first


def bench_engines(
    engines: Sequence[str | Path],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rounds: int = 30,
    threads: int | None = None,
) -> Any:
    """Time engine directories (a twins directory stands for its three) against each other; returns a `BenchReport`.

    Engines that this machine cannot run are named in the report with the reason, unless none is left.
    """
    from engines.base import LoadOptions, backend
    from engines.benchmark.latency import bench, sparse_verdict
    from engines.passport import load_passport
    from nxm_export.pipeline.sparsity_twins import DENSE, SPARSE, is_twins, twin_directories

    given = [Path(path) for path in engines]
    paths = [part for path in given for part in (twin_directories(path) if is_twins(path) else [path])]
    if len({path.resolve() for path in paths}) < len(paths):
        raise EngineError("the same engine is given twice; copy its directory to time it against itself")
    named = len({path.resolve().name for path in paths}) == len(paths)
    passports = {path: load_passport(path) for path in paths}
    unmeasured: dict[str, str] = {}
    with ExitStack() as stack:
        loaded = {}
        names = {}
        for path in paths:
            name = path.resolve().name if named else str(path)
            runtime = backend(passports[path].backend)
            try:
                loaded[name] = stack.enter_context(runtime.load(path, LoadOptions(threads)))
                names[passports[path].twin] = (name, path)
            except EngineUnavailable as error:
                unmeasured[name] = str(error)
        if not loaded:
            raise EngineUnavailable(f"nothing could be timed here: {'; '.join(dict.fromkeys(unmeasured.values()))}")
        report = bench(loaded, shapes, rounds=rounds, vocabulary=_vocabulary(paths))
    verdict = None
    if DENSE in names and SPARSE in names:
        (dense, _), (sparse, path) = names[DENSE], names[SPARSE]
        gpu = passports[path].device.get("gpu", "this GPU")
        verdict = sparse_verdict(report, sparse, dense, sparsity_of(path, None, None).sparse_share, gpu)
    missing = tuple(f"{name}: {why}" for name, why in unmeasured.items())
    return replace(report, verdict=verdict, unmeasured=missing)


def bench_text(
    engines: Sequence[str | Path],
    data: str,
    *,
    batch: int | None = None,
    rounds: int | None = None,
    threads: int | None = None,
    columns: Columns = Columns(),
    others: Mapping[str, Callable[[], float]] | None = None,
) -> Any:
    """Sentences a second of CPU engine directories over the text of a data file; returns a `TextReport`.

    All engines must read the text in the same tokens and give one answer a sentence. `others` are timed between them (see
    `engines.benchmark.text_throughput`).
    """
    from engines.base import LoadOptions, backend, cpu_backends
    from engines.benchmark import text_throughput
    from engines.passport import load_passport

    paths = [Path(path) for path in engines]
    for path in paths:
        name = load_passport(path).backend
        if name not in cpu_backends():
            raise EngineError(
                f"{path}: text is timed on CPU engines ({', '.join(cpu_backends())}), and this is of {name}"
            )
        if any("sequence" in axes for axes in load_spec(path).outputs.values()):
            raise EngineError(f"{path}: it has an answer for every token; text is timed for one answer a sentence")
    _shared_features(paths, data, columns)
    spec = load_spec(paths[0])
    limit = min(load_spec(path).max_length for path in paths)
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    with ExitStack() as stack:
        loaded = {
            name: stack.enter_context(backend(load_passport(path).backend).load(path, LoadOptions(threads)))
            for name, path in zip(names, paths, strict=True)
        }
        return text_throughput.bench_text(
            loaded,
            _tokeniser(paths[0], data, columns, limit),
            pad_id=spec.pad_id,
            limit=limit,
            batch=batch or text_throughput.BATCH,
            rounds=rounds or text_throughput.ROUNDS,
            others=others or {},
        )


def _tokeniser(directory: Path, data: str, columns: Columns, limit: int) -> Callable[[], list[Any]]:
    """A function that makes token features of a data file's text, which is read here, once."""
    from nxm_export.contract.tasks import TASKS
    from nxm_export.data.examples import encode, load_tokenizer
    from nxm_export.data.label_kinds import labelled, load_labelled, names_for

    spec = load_spec(directory)
    task = TASKS[spec.task]
    raw = load_labelled(data, "dev", columns, task)
    examples = labelled(raw, task, names_for(raw, task, spec.labels))
    tokenizer = load_tokenizer(directory)
    return lambda: encode(tokenizer, examples, min(limit, spec.max_length), spec.inputs)


def _vocabulary(engines: Sequence[Path]) -> int:
    """Token ids below this exist in every engine."""
    from engines.base import spec_of
    from engines.benchmark.latency import VOCABULARY

    specs = [spec_of(path) for path in engines]
    return min([VOCABULARY, *(spec.limits["input_ids"] for spec in specs if spec and "input_ids" in spec.limits)])


def load_servers(
    urls: Sequence[str],
    model: str,
    data: str,
    engine: Path | None,
    clients: Sequence[int],
    seconds: float,
    rounds: int,
    encoding: str,
    task: str = "classification",
) -> Any:
    """Load running servers with the samples of a data file; returns a `LoadReport`.

    With an `engine` directory they are sent as tokens of its tokenizer, else as text: what a model of `task` reads, a text or a
    pair of texts a request. Their order is shuffled once.
    """
    import random

    from engines.benchmark.http_load import measure, text_target, token_target
    from nxm_export.contract.io_spec import load_spec
    from nxm_export.contract.tasks import task_named
    from nxm_export.data.examples import Columns
    from nxm_export.data.label_kinds import load_labelled, read_by_model

    if engine is None:
        kind = task_named(task)
        texts = read_by_model(load_labelled(data, "dev", Columns(), kind), kind)
        texts = random.Random(0).sample(texts, len(texts))
        targets = [text_target(url, url, model, texts) for url in urls]
    else:
        features = features_of(engine, data, Columns())
        features = random.Random(0).sample(features, len(features))
        targets = [token_target(url, url, model, features, load_spec(engine), encoding=encoding) for url in urls]
    return measure(targets, clients, seconds=seconds, rounds=rounds)


def features_of(directory: Path, data: str, columns: Columns, limit: int | None = None) -> list[Any]:
    """A labelled data file in tokens (at most `limit`), by the tokenizer and labels of a graph or engine directory."""
    return _tokeniser(directory, data, columns, limit or load_spec(directory).max_length)()
