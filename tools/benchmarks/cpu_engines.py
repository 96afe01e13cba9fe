"""What the CPU benches share: engines of a checkpoint by placement, NNCF's model of the dense graph beside them, and
both held against the checkpoint, loaded and timed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.base import BuildOptions, Engine, LoadOptions, backend, spec_of
from engines.benchmark.latency import feeds_for, interleaved, paired
from engines.openvino.backend import OpenVinoEngine, compile_models, read_model
from engines.ort.backend import ENGINE_FILE
from engines.passport import Bindings
from nxm_export.contract.io_spec import load_spec
from nxm_export.data.columns import Columns
from nxm_export.data.features import pad
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_builds import build_engine
from nxm_export.pipeline.engine_comparison import compare_engines
from nxm_export.pipeline.labelled_texts import features_of
from tools import ROOT
from tools.benchmarks.cpu_record import LatencyRow, Load, ParityRow
from tools.benchmarks.cpu_section import PEER, PEER_FIXED
from tools.benchmarks.measuring import in_child

PEERS = "NXM_PEERS_PYTHON"
CALIBRATION = 100  # sentences for NNCF, which needs some and learns nothing from more here
OURS, FLOAT = "INT8 2:4", "FP32"  # how the names of engines begin
PLACEMENTS = {  # of the compressed checkpoint's graph: how the names of its engines begin
    "inputs": OURS,
    "inputs-outputs": f"{OURS}, outputs too",
    "products": f"{OURS}, all products",
    "attention": f"{OURS}, attention too",
}


@dataclass(frozen=True)
class Recipe:
    """An engine: of the dense model where `placement` is None; with a model compiled for each shape where `fixed`."""

    placement: str | None
    backend: str
    fixed: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        kind = FLOAT if self.placement is None else PLACEMENTS[self.placement]
        return f"{kind}, {self.backend}" + (", fixed shapes" if self.fixed else "")


def by_name(*recipes: Recipe) -> dict[str, Recipe]:
    """Recipes by their names."""
    return {recipe.name: recipe for recipe in recipes}


@dataclass(frozen=True)
class Sources:
    """The two checkpoints that engines are built from."""

    dense: Path
    compressed: Path


def build_all(
    recipes: Mapping[str, Recipe], sources: Sources, work: Path, threads: int, shapes: Sequence[tuple[int, int]]
) -> dict[str, Path]:
    """Export each graph once and build every engine from it under `work`; directories by name."""
    graphs: dict[str | None, Path] = {}
    directories = {}
    for name, recipe in recipes.items():
        if recipe.placement not in graphs:
            source = sources.dense if recipe.placement is None else sources.compressed
            out = work / f"graph-{recipe.placement or 'dense'}"
            graphs[recipe.placement] = export(source, out, target="cpu", placement=recipe.placement).path
        directories[name] = work / name.replace(" ", "-").replace(",", "").replace(":", "of")
        options = BuildOptions(threads=threads, shapes=tuple(shapes) if recipe.fixed else ())
        build_engine(graphs[recipe.placement], directories[name], recipe.backend, options)
    return directories


def compared(checkpoint: Path, directories: Mapping[str, Path], data: Path) -> list[ParityRow]:
    """What `nxm compare` says about engines, with the accuracy gate of half a point."""
    reports = compare_engines(checkpoint, list(directories.values()), str(data), gates=["drop<=0.5"]).reports
    return [
        {
            "engine": name,
            "passed": report.passed,
            "metric": report.metric,
            "samples": report.samples,
            "checkpoint": report.reference_value,
            "value": report.engine_value,
            "difference_interval": report.difference_interval,
            "agreement": report.outputs[0].agreement,
            "mean_abs": report.outputs[0].mean_abs,
            "mean_tolerance": report.outputs[0].mean_tolerance,
        }
        for name, report in zip(directories, reports, strict=True)
    ]


def loads_of(directories: Mapping[str, Path], threads: int) -> dict[str, Load]:
    """What loading each engine takes, in a process of its own."""
    return {
        name: in_child(Load, "tools.benchmarks.cpu_load", str(directory), str(threads))
        for name, directory in directories.items()
    }


class Peer(OpenVinoEngine):
    """A model that OpenVINO wrote, run with the same settings as ours, at `shapes` by models compiled for them."""

    def __init__(self, model: Path, threads: int, made_by: str, shapes: Sequence[tuple[int, int]] = ()) -> None:
        models = compile_models(model, read_model(model, model), threads, shapes)
        super().__init__(model.parent, models, spec_of(model.parent), Bindings())
        self.made_by, self.model = made_by, model
        self.bytes = sum(part.stat().st_size for part in (model, model.with_suffix(".bin")))


def peers(
    dense: Path, data: Path, work: Path, threads: int, shapes: Sequence[tuple[int, int]]
) -> tuple[Peer, Peer] | None:
    """NNCF's INT8 model of the graph in engine directory `dense`, free and with `shapes` compiled; None where no
    interpreter makes one. It is calibrated on sentences of the data file (inputs alone, no labels)."""
    python = os.environ.get(PEERS)
    if not python:
        return None
    features, pad_id = features_of(dense, str(data), Columns())[:CALIBRATION], load_spec(dense).pad_id
    arrays = {
        f"{number}/{name}": array
        for number, sample in enumerate(features)
        for name, array in pad([sample], pad_id).items()
    }
    np.savez(work / "calibration.npz", allow_pickle=False, **arrays)
    tool = ROOT / "tools" / "experiments" / "nncf_peer.py"
    command = [python, str(tool), str(dense / ENGINE_FILE), str(work / "calibration.npz"), str(work / "peer.xml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{PEERS}: the peer could not be made:\n{done.stderr[-2000:]}")
    made_by = done.stdout.strip().splitlines()[-1]
    return Peer(work / "peer.xml", threads, made_by), Peer(work / "peer.xml", threads, made_by, shapes)


def loaded_all(
    recipes: Mapping[str, Recipe],
    directories: Mapping[str, Path],
    peer: tuple[Peer, Peer] | None,
    threads: int,
    stack: ExitStack,
) -> dict[str, Engine]:
    """Every engine, ours and the peer's, by name; `stack` closes them."""
    loaded: dict[str, Engine] = {
        name: stack.enter_context(backend(recipes[name].backend).load(directory, LoadOptions(threads=threads)))
        for name, directory in directories.items()
    }
    if peer is not None:
        loaded |= {name: stack.enter_context(engine) for name, engine in zip((PEER, PEER_FIXED), peer, strict=True)}
    return loaded


def latency_of(
    loaded: Mapping[str, Engine], shape: tuple[int, int], rounds: int, also: Mapping[str, tuple[str, str]]
) -> LatencyRow:
    """Median milliseconds by engine, and the paired ratios that the tables need; larger is faster.

    `also` has more pairs (reference, engine) by what their ratio says.
    """
    timers = {name: engine.timer(feeds_for(engine, *shape, 1000, 0)) for name, engine in loaded.items()}
    taken = {name: np.array(times) for name, times in interleaved(timers, rounds, settle=True).items()}
    medians = {name: float(np.median(times)) for name, times in taken.items()}

    def fastest(kind: str) -> str:
        return min((name for name in taken if name.startswith(kind)), key=medians.__getitem__)

    ort, best = f"{OURS}, ort", fastest(OURS)
    pairs = {
        "ort over its own FP32": (f"{FLOAT}, ort", ort),
        "our fastest over the best FP32": (fastest(FLOAT), best),
        **also,
    }
    if PEER in taken:
        pairs |= {"our fastest over NNCF": (fastest(PEER), best), "ort over NNCF": (fastest(PEER), ort)}
    return {
        "batch": shape[0],
        "sequence": shape[1],
        "rounds": rounds,
        "median_ms": medians,
        "quartiles_ms": {name: np.percentile(times, [25, 75]).tolist() for name, times in taken.items()},
        "ratios": {
            what: {"of": name, "against": reference, "ratio": ratio, "interval": list(interval)}
            for what, (reference, name) in pairs.items()
            for ratio, interval in [paired(taken[reference], taken[name])]
        },
    }
