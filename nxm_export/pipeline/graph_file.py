"""Where the ONNX file of a graph is: what every command that takes a graph accepts."""

from __future__ import annotations

from pathlib import Path

from nxm_export.errors import ArtifactError

GRAPH_FILE = "model.onnx"


def is_graph_directory(path: Path) -> bool:
    """True for a directory that `nxm export` writes; an engine directory may hold a ``model.onnx``, and is
    none."""
    from engines.passport import PASSPORT_FILE

    return (path / GRAPH_FILE).is_file() and not (path / PASSPORT_FILE).is_file()


def onnx_file(graph: str | Path) -> Path:
    """The ONNX file of a graph directory, or the file itself, whether it is there or not.

    Raises `ArtifactError` for a directory without a graph, and for an engine directory: its file is what a runtime made
    of the graph.
    """
    path = Path(graph)
    if not path.is_dir():
        return path
    if not (path / GRAPH_FILE).is_file():
        raise ArtifactError(f"{path} has no {GRAPH_FILE}: it is not a graph directory; {_way_out(path)}")
    if not is_graph_directory(path):
        raise ArtifactError(f"{path} is an engine directory; give the graph that it was built from")
    return path / GRAPH_FILE


def _way_out(path: Path) -> str:
    """How to get the graph of a directory that holds something else."""
    if (path / "config.json").is_file():
        return f"it is a model: `nxm export {path} --out GRAPH` makes its graph"
    graphs = sorted(graph.parent for graph in path.glob(f"onnx/*/{GRAPH_FILE}"))
    if graphs:
        return f"it is a run: give one of its graphs, {', '.join(map(str, graphs))}"
    return "make one with `nxm export`"
