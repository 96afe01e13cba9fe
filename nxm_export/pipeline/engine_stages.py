"""The stages of a run behind its graphs: engines are built, compared with their checkpoint, timed, and one is kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.contract.choices import BENCH_SHAPES
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.records.run_summary import NO_CHOICE, ChosenEngine
from nxm_export.data.features import Features
from nxm_export.errors import EngineError, EngineUnavailable
from nxm_export.pipeline.later_comparisons import failed_file
from nxm_export.pipeline.run_engines import GRAPHS, RunBackends, RunEngine
from nxm_export.pipeline.summary import BENCH_FILE, BuildResults
from nxm_export.progress import Progress
from nxm_export.storage.json_files import encode
from nxm_export.storage.run_dir import RunDir

if TYPE_CHECKING:
    from engines.base import BuildOptions

ROUNDS = 20
CHOICE_FILE = "choice.json"
# On a GPU a batch of many tokens, too: few tokens leave it idle, and say nothing about 2:4.
_GPU_SHAPES = (*BENCH_SHAPES, (32, 128))


def drop_others(directory: RunDir, engines: Sequence[RunEngine], graphs: Sequence[str]) -> None:
    """Remove graphs and engines of an earlier run into the same directory that this one does not have: they are of
    another model, and a report would show them beside this one's."""
    names = {engine.name for engine in engines}
    kept = {"export": ("onnx", {*graphs}), "build": ("engines", names), "compare": ("compare", names)}
    for stage in [*directory.manifest.stages]:
        verb, _, name = stage.partition(" ")
        if verb in kept and name not in kept[verb][1]:
            directory.drop(stage, f"{kept[verb][0]}/{name}")


def build_engines(directory: RunDir, engines: Sequence[RunEngine], progress: Progress) -> BuildResults:
    """Build every engine of the run that this machine can build; of one that fails, what an earlier run left goes."""
    from engines.base import backend
    from engines.sparsity.build_evidence import LOG_FILE

    made: dict[str, str] = {}
    missing: dict[str, str] = {}
    failed: dict[str, str] = {}
    for number, engine in enumerate(engines):
        progress("build", number, len(engines))
        options = _build_options(directory, engine, [other for other in engines if other.name in made])
        try:
            directory.stage(
                f"build {engine.name}",
                f"engines/{engine.name}",
                partial(
                    backend(engine.backend).build, directory.path("onnx", engine.graph, "model.onnx"), options=options
                ),
                inputs={"onnx": directory.path("onnx", engine.graph)},
                options=_recorded(engine),
                kept_log=LOG_FILE,
                by_these_versions=True,
            )
            made[engine.name] = engine.graph
        except EngineUnavailable as error:
            missing[engine.name] = str(error)
        except EngineError as error:
            directory.drop(f"build {engine.name}", f"engines/{engine.name}")  # of an earlier run, with its comparison
            if engine.backend == "ort":  # without which there is nothing to show
                raise
            failed[engine.name] = str(error)
    progress("build", len(engines), len(engines))
    return BuildResults(made, missing, failed)


def _build_options(directory: RunDir, engine: RunEngine, made: Sequence[RunEngine]) -> BuildOptions:
    """What the build is told; twins share a timing cache, so that they differ in nothing that was measured twice."""
    from engines.base import BuildOptions
    from engines.tensorrt.builder_process import CACHE_FILE

    caches = [directory.path("engines", other.name, CACHE_FILE) for other in made if other.backend == engine.backend]
    cache = next((file for file in reversed(caches) if file.is_file()), None) if engine.twin else None
    return BuildOptions(sparse=engine.sparse, twin=engine.twin, timing_cache=cache)


def _recorded(engine: RunEngine) -> dict[str, object]:
    """The options of a build's stage; those of a twin only where it is one, so that older runs need no new build."""
    options: dict[str, object] = {"backend": engine.backend}
    return options if engine.twin is None else {**options, "sparse": engine.sparse, "twin": engine.twin}


def compare_built(
    directory: RunDir,
    engines: Sequence[RunEngine],
    built: BuildResults,
    features: Sequence[Features],
    progress: Progress,
) -> BuildResults:
    """Compare every engine with its checkpoint; what cannot run here is `missing` in what is returned, and what fails
    where it runs is `failed`.

    A comparison replaces the report beside the engine, as `nxm compare` does. One that is up to date is not made again:
    what somebody found of that engine since stays, and decides (see `nxm_export.pipeline.later_comparisons`).
    """
    from engines.parity.compare import compare
    from engines.parity.reports import OUTPUTS_FILE, PARITY_FILE

    samples = hashlib.sha256(json.dumps(features).encode()).hexdigest()
    missing, failed = dict(built.missing), dict(built.failed)
    compared = [engine for engine in engines if engine.name in built.graphs]
    for number, entry in enumerate(compared):
        progress("compare", number, len(compared))
        name, source = entry.name, GRAPHS[entry.graph].source
        engine = directory.path("engines", name)

        def work(scratch: Path, source: str = source, engine: Path = engine) -> None:
            compare(directory.path(source), engine, features)
            for file in (PARITY_FILE, OUTPUTS_FILE):
                shutil.copyfile(engine / file, scratch / file)

        try:
            directory.stage(
                f"compare {name}",
                f"compare/{name}",
                work,
                inputs={source: directory.path(source), "passport": engine / "passport.json"},
                options={"samples": samples},
                by_these_versions=True,
            )
        except EngineUnavailable as error:
            missing[name] = f"built, not run: {error}"
        except EngineError as error:
            directory.drop(f"compare {name}", f"compare/{name}")  # of an earlier run, in which it did not fail
            if entry.backend == "ort":  # without which there is nothing to show
                raise
            failed[name] = f"built, and failed when it ran: {error}"
    progress("compare", len(compared), len(compared))
    names = tuple(entry.name for entry in compared if not {entry.name} & {*missing, *failed})
    return replace(built, missing=missing, failed=failed, compared=names)


def bench_built(directory: RunDir, engines: Sequence[RunEngine], progress: Progress) -> None:
    """Time the `engines`, which all run here: those of the CPU together, those of each backend on a GPU by themselves,
    since they have another clock."""
    from engines.base import cpu_backends

    groups: dict[str, list[str]] = {}
    for engine in engines:
        file = BENCH_FILE if engine.backend in cpu_backends() else f"{engine.backend}.json"
        groups.setdefault(file, []).append(engine.name)
    limit = load_spec(directory.path("onnx", "cpu")).max_length
    shapes = {file: _fitted(BENCH_SHAPES if file == BENCH_FILE else _GPU_SHAPES, limit) for file in groups}

    def work(scratch: Path) -> None:
        for number, (file, names) in enumerate(groups.items()):
            progress("bench", number, len(groups))
            paths = [str(directory.path("engines", name)) for name in names]
            given = [f"--shape={batch}x{sequence}" for batch, sequence in shapes[file]]
            timed = in_own_process("nxm_export", "bench", *paths, f"--rounds={ROUNDS}", "--json", *given)
            (scratch / file).write_text(timed, encoding="utf-8")
        progress("bench", len(groups), len(groups))

    inputs = {engine.name: directory.path("engines", engine.name, "passport.json") for engine in engines}
    options: dict[str, object] = {"shapes": shapes[BENCH_FILE], "rounds": ROUNDS}
    if len(groups) > 1:
        options["shapes on a GPU"] = _fitted(_GPU_SHAPES, limit)
    directory.stage("bench", "bench", work, inputs=inputs, options=options, by_these_versions=True)


def _fitted(shapes: Sequence[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    return list(dict.fromkeys((batch, min(sequence, limit)) for batch, sequence in shapes))


def in_own_process(module: str, *arguments: str) -> str:
    """What a module prints in a process of its own: the thread pool that training left behind would slow engines
    down."""
    from engines.base import module_command

    child = subprocess.run(module_command(module, *arguments), capture_output=True, text=True, check=False)
    if child.returncode:
        raise EngineError(
            f"timing the engines failed: {child.stderr.strip()}; where one of them is at fault, run again with the "
            "others as --backend: what was done is kept"
        )
    return child.stdout


def choose_engine(
    directory: RunDir, engines: Sequence[RunEngine], built: BuildResults, backends: RunBackends
) -> ChosenEngine:
    """The engine that the run's numbers are about: of the candidates that compute what the checkpoint computes, and did
    not fail a later comparison, the one of the fastest backend. Where none does, the first, which then fails the run.

    Raises `EngineUnavailable` where no candidate was built and compared.
    """
    from engines.parity.reports import PARITY_FILE, read_parity_report

    mains = {engine.backend: engine.name for engine in engines if engine.main and engine.backend in backends.candidates}
    left_out = dict(backends.left_out)
    compared, passing = [], []
    for backend, name in mains.items():
        why = built.missing.get(name) or built.failed.get(name)
        if why is not None:
            left_out[backend] = why
            continue
        compared.append(backend)
        later = failed_file(directory.path("engines", name))  # of a comparison that the run did not make
        if not read_parity_report(directory.path("compare", name, PARITY_FILE)).passed:
            left_out[backend] = "it does not compute what the checkpoint computes"
        elif later is not None:
            left_out[backend] = f"{later} says that it failed a later comparison"
        else:
            passing.append(backend)
    if not compared:
        reasons = "; ".join(f"{backend}: {why}" for backend, why in left_out.items())
        raise EngineUnavailable(f"no engine of {', '.join(backends.candidates)} runs here ({reasons})")
    others = "".join(f"; left out: {backend}: {why}" for backend, why in left_out.items())
    if len(passing) > 1:
        backend, why = _fastest(directory, {backend: mains[backend] for backend in passing})
    else:
        directory.drop("choose", "choice")  # of an earlier run with more candidates
        backend = (passing or compared)[0]
        why = NO_CHOICE if not others else "the only one that passes the comparison"
        why = why if passing else "no engine passes the comparison"
    return ChosenEngine(mains[backend], backend, f"{why}{others}")


def _fastest(directory: RunDir, engines: Mapping[str, str]) -> tuple[str, str]:
    """(backend, why) of the fastest engine, by measurement in a stage of its own; `engines` are names by backend."""
    from engines.benchmark.fastest_backend import SCHEMA, Choice
    from nxm_export.storage.json_files import read_record

    pairs = [f"{backend}={directory.path('engines', name)}" for backend, name in engines.items()]
    directory.stage(
        "choose",
        "choice",
        lambda scratch: (scratch / CHOICE_FILE).write_text(in_own_process(__name__, *pairs), encoding="utf-8"),
        inputs={name: directory.path("engines", name, "passport.json") for name in engines.values()},
        by_these_versions=True,
    )
    file = directory.path("choice", CHOICE_FILE)
    choice = read_record(file, Choice, schema=SCHEMA, way_out="run the same `nxm run` again")
    return choice.backend, choice.why


def print_fastest(arguments: Sequence[str]) -> None:
    """Time the engines of ``BACKEND=DIRECTORY`` arguments against each other, and print the choice as JSON."""
    from engines.benchmark.fastest_backend import SCHEMA, choose

    engines = {backend: Path(path) for backend, _, path in (text.partition("=") for text in arguments)}
    sys.stdout.write(encode(choose(engines, {}), SCHEMA))


if __name__ == "__main__":
    print_fastest(sys.argv[1:])
