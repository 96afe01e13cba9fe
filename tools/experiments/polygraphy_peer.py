"""What polygraphy reads of ONNX files, and what we do: `polygraphy inspect sparsity` beside `nxm doctor`, as a table.

    python tools/experiments/polygraphy_peer.py FILE.onnx ... > table.md

Exits with 1 when polygraphy names a tensor that ours does not list, or calls one sparse that ours calls dense, or the
reverse. polygraphy reads float initializers that a MatMul, Gemm or Conv reads as they are.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from nxm_export.contract.records.matrix_facts import ScannedProducts
from nxm_export.errors import NxmError
from nxm_export.graph.reading.graph_weights import load_graph
from nxm_export.graph.reading.sparsity_scan import scan_products
from tools.rendering import table


def polygraphy(file: Path) -> dict[str, bool] | None:
    """Every tensor that polygraphy judges, and whether it calls it sparse; None where it fails."""
    command = [str(Path(sys.executable).with_name("polygraphy")), "inspect", "sparsity", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    found = re.findall(r"Found (non-)?sparse tensor: (\S+)", done.stdout + done.stderr)
    return {name: not denied for denied, name in found}


def ours(file: Path) -> ScannedProducts | None:
    """Our products, or None where the file is refused."""
    try:
        return scan_products(load_graph(file), str(file))
    except NxmError:
        return None


def row(file: Path) -> tuple[list[str], bool]:
    """(cells of a row of the table, whether nothing of polygraphy's is missing or otherwise in ours)."""
    theirs, scanned = polygraphy(file), ours(file)
    mine = [] if scanned is None else _rows(scanned)
    known = {(part, kind) for name, _, kind in mine for part in name.split(" + ")}
    judged = [(name, "2:4" if sparse else "dense") for name, sparse in (theirs or {}).items()]
    differing = [name for name, kind in judged if not known & {(name, kind), (name, "not read"), (name, "empty")}]
    reported = "fails" if theirs is None else ", ".join(f"{name}: {kind}" for name, kind in judged) or "nothing"
    read = "refused" if scanned is None else ", ".join(f"{name} ({node}): {kind}" for name, node, kind in mine)
    return [file.stem, reported, read or "nothing", ", ".join(differing) or "none"], not differing


def _rows(scanned: ScannedProducts) -> list[tuple[str, str, str]]:
    """(constant, product, our verdict); an empty matrix, which polygraphy calls sparse, is neither."""
    read = [
        (fact.name, fact.node, "2:4" if fact.sparse_along_k else "dense" if fact.k and fact.n else "empty")
        for fact in scanned.facts
    ]
    return [*read, *((product.name, product.node, "not read") for product in scanned.unread)]


def main(files: list[str]) -> int:
    """Print the table; returns the exit code."""
    rows = [row(Path(file)) for file in files]
    print(table([cells for cells, _ in rows], ["file", "polygraphy", "ours", "differing"], "llll"))
    return 0 if all(same for _, same in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
