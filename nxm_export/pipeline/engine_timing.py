"""Engine directories are timed against each other, and running servers are loaded with requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.contract.choices import (
    BENCH_ROUNDS,
    BENCH_SHAPES,
    TASK,
    TEXT_BATCH,
    TEXT_ROUNDS,
    TOKEN_ENCODING,
)
from nxm_export.contract.io_spec import load_spec
from nxm_export.data.columns import Columns
from nxm_export.errors import EngineError, EngineUnavailable, NxmError
from nxm_export.pipeline.engine_sparsity import is_unprofiled, sparsity_of
from nxm_export.pipeline.labelled_texts import features_of, labelled_texts, shared_features

if TYPE_CHECKING:
    from engines.base import Engine
    from engines.benchmark.http_load import LoadReport
    from engines.benchmark.latency import BenchReport
    from engines.benchmark.text_throughput import TextReport
    from engines.passport import EnginePassport
    from engines.sparsity.sparsity_report import WeightSparsity


def bench_engines(
    engines: Sequence[str | Path],
    shapes: Sequence[tuple[int, int]] | None = None,
    rounds: int = BENCH_ROUNDS,
    threads: int | None = None,
) -> BenchReport:
    """Time engine directories (a twins directory stands for its three) against each other, at `shapes` of (batch,
    sequence); without any at `BENCH_SHAPES`, with the batch or length that the engines have fixed, and no longer than
    their models take.

    Engines that this machine cannot run, or that fail where they are loaded or at a shape, are named in the report with
    the reason, unless none is left.
    """
    from engines.base import LoadOptions, backend
    from engines.benchmark.latency import bench, fitted_shapes
    from engines.devices import running_on
    from engines.memory import require_room
    from engines.passport import load_passport
    from nxm_export.pipeline.sparsity_twins import is_twins, read_twins, twin_directories

    given = [Path(path) for path in engines]
    paths = [part for path in given for part in (twin_directories(path).values() if is_twins(path) else [path])]
    unbuilt = {
        str(path / name): why for path in given if is_twins(path) for name, why in read_twins(path).failed.items()
    }
    if len({path.resolve() for path in paths}) < len(paths):
        raise EngineError("the same engine is given twice; copy its directory to time it against itself")
    passports = {path: load_passport(path) for path in paths}
    unmeasured: dict[str, EngineError] = {}
    twins: dict[str, tuple[str, Path]] = {}
    with ExitStack() as stack:
        loaded: dict[str, Engine] = {}
        for path, name in zip(paths, _names(paths), strict=True):
            try:
                runtime = backend(passports[path].backend)
                loaded[name] = stack.enter_context(runtime.load(path, LoadOptions(threads)))
            except EngineError as error:
                unmeasured[name] = error
            else:
                if twin := passports[path].twin:
                    twins[twin] = (name, path)
        if not loaded:
            real = [error for error in unmeasured.values() if not isinstance(error, EngineUnavailable)]
            if real:
                raise real[0]
            reasons = dict.fromkeys(map(str, unmeasured.values()))
            raise EngineUnavailable(f"nothing could be timed here: {'; '.join(reasons)}")
        # Each once: a table by shape would hold the time of one round against that of the other.
        shapes = tuple(dict.fromkeys(shapes or fitted_shapes(loaded.values(), _default_shapes(paths))))
        for path, name in zip(paths, _names(paths), strict=True):
            if name in loaded:
                require_room(path, shapes, "timing it at", way_out="give a --shape of fewer rows or shorter texts")
        report = bench(loaded, shapes, rounds=rounds, vocabulary=_vocabulary(paths))
    absent = (
        *(f"{name} was not built: {why}" for name, why in unbuilt.items()),
        *(f"{name}: {why}" for name, why in unmeasured.items()),
    )
    measured = [passports[path] for path, name in zip(paths, _names(paths), strict=True) if name not in unmeasured]
    verdict = _verdict(report, twins, passports)
    return replace(report, verdict=verdict, unmeasured=(*absent, *report.unmeasured), machine=running_on(measured[0]))


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
    try:
        gpu, found = passports[path].device.get("gpu", "this GPU"), sparsity_of(path)
    except NxmError as error:  # the times are right without it, and took minutes
        return f"no verdict: which kernels {path} runs is not known: {error}"
    # Evidence that says nothing of these products is not evidence that 2:4 does nothing for them.
    unknown = None if found.open_question is None else _unknown(path, found.open_question)
    return sparse_verdict(report, sparse, dense, found.sparse_share, gpu, unknown)


def _unknown(path: Path, weight: WeightSparsity) -> str:
    """Why it is not known that the engine at `path` runs no sparse kernel, by a matrix that leaves it open."""
    if weight.chosen is False:
        return f"{path} runs sparse kernels, and no matrix on those of INT8 alone: {weight.detail} ({weight.kernel})"
    if weight.reason == "unknown" and is_unprofiled(path):
        return f"which kernels {path} runs is not known (profile it with `nxm inspect {path} --measure`)"
    return f"which kernels {path} runs is not known: {weight.detail}"


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
    features, _ = shared_features(paths, data, columns)
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
            labelled_texts(paths[0], data, columns, limit).tokens,
            pad_id=load_spec(paths[0]).pad_id,
            limit=limit,
            batch=batch,
            rounds=TEXT_ROUNDS if rounds is None else rounds,
            for_throughput=for_throughput,
            others=others or {},
        )


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
