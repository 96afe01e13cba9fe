"""The section of docs/performance.md that `tools.benchmarks.cpu` writes from its record: tables, aims, and what missed
them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from engines.benchmark.latency import paired
from tools.benchmarks.cpu_record import EmbeddingRecord, LatencyRow, Load, ParityRow, ProfileRow, Record, TextRecord
from tools.benchmarks.measuring import Ratio
from tools.rendering import render

PEER = "INT8 dense by NNCF, openvino"
PEER_FIXED = f"{PEER}, fixed shapes"
Cells = list[list[str]]


def section(record: Record) -> str:
    """The section of a record; the text stands in ``cpu.md.j2``."""
    machine, latency = record["machine"], record["latency"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return render(
        "benchmarks/cpu.md.j2",
        plan=", ".join(f"{count} x {option}" for option, count in record["model"]["plan"].items()),
        machine=f"{machine.get('name', 'unknown')}, {machine.get('features', '')}, "
        f"{machine['threads']} threads on {machine['cores']} cores",
        load=f"{record['load_average_before']:.2f}",
        versions=f"{versions}; peer: {record['peer']}" if record["peer"] else versions,
        seconds=record["seconds"],
        shapes=[f"{row['batch']}x{row['sequence']}" for row in latency],
        latencies=latency_cells(latency, record["bytes"]),
        speedups=speedup_cells(latency),
        fixed=any(name.endswith("fixed shapes") for name in latency[0]["median_ms"]),
        loads=load_cells(record["loads"]),
        aims=aim_cells(latency),
        parity=parity_cells(record["parity"]),
        parity_of=record["parity"][0] if record["parity"] else {},
        text=record["text"],
        texts=_texts(record["text"]),
        text_peers=record["text_peers"],
        embeddings=_embeddings(record["embeddings"]),
        embedded=record["embeddings"],
        profile=[_profile(entry) for entry in record["profile"]],
        products=[_products(entry, reached) for entry in record["profile"] if (reached := entry.get("int8_gops"))],
    )


def summary(record: Record) -> str:
    """The README's summary of speed on a CPU; the text stands in ``cpu_summary.md.j2``."""
    return render(
        "benchmarks/cpu_summary.md.j2",
        shapes=len(record["latency"]),
        over_float=float_span(record),
        peer=_peer_span(record) if record["peer"] else None,
    )


def float_span(record: Record) -> str:
    """The lowest and the highest speed of the ONNX Runtime engine over FP32 at the measured shapes."""
    ratios = [row["ratios"]["ort over its own FP32"]["ratio"] for row in record["latency"]]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _peer_span(record: Record) -> str:
    """How our fastest engine's time compares with the peer's, at the worst shape and at the best."""
    times = {
        f"{row['batch']}x{row['sequence']}": 1.0 / row["ratios"]["our fastest over NNCF"]["ratio"]
        for row in record["latency"]
    }
    ends = (max(times, key=times.__getitem__), min(times, key=times.__getitem__))
    return " and ".join(
        f"{100 * abs(times[shape] - 1.0):.0f} % {'slower' if times[shape] > 1.0 else 'faster'} ({shape})"
        for shape in ends
    )


def latency_cells(latency: Sequence[LatencyRow], sizes: Mapping[str, int]) -> Cells:
    """Engine, megabytes, and milliseconds at every shape."""
    return [
        [
            name,
            f"{sizes[name] / 1e6:.1f}" if name in sizes else "–",
            *(_middle(row["median_ms"][name], *row["quartiles_ms"][name]) for row in latency),
        ]
        for name in latency[0]["median_ms"]
    ]


def speedup_cells(latency: Sequence[LatencyRow]) -> Cells:
    """What a ratio says, and it at every shape."""
    return [[what, *(_ratio(row["ratios"][what]) for row in latency)] for what in latency[0]["ratios"]]


def load_cells(loads: Mapping[str, Load]) -> Cells:
    """Engine, seconds and megabytes."""
    return [[name, f"{load['seconds']:.2f}", f"{load['bytes'] / 1e6:.0f}"] for name, load in loads.items()]


def aim_cells(latency: Sequence[LatencyRow]) -> Cells:
    """What was aimed at, and the verdict at every shape; aims against NNCF where it was timed."""
    aims = _aims("our fastest over NNCF" in latency[0]["ratios"])
    return [[what, *map(verdict, latency)] for what, verdict in aims.items()]


def parity_cells(parity: Sequence[ParityRow]) -> Cells:
    """Engine, and what `nxm compare` says of it."""
    return [_parity(entry) for entry in parity]


def _aims(with_peer: bool) -> dict[str, Callable[[LatencyRow], str]]:
    """What was aimed at, by its words: a function from a row of latencies to the verdict."""

    def at_least(what: str, limit: float) -> Callable[[LatencyRow], str]:
        def verdict(row: LatencyRow) -> str:
            ratio = row["ratios"][what]["ratio"]
            return f"{_holds(ratio >= limit)}: {ratio:.2f}"

        return verdict

    def best(row: LatencyRow) -> str:
        limit = 3.0 if row["batch"] > 1 else 2.2
        return at_least("our fastest over the best FP32", limit)(row) + f" of {limit}"

    def of_peer(row: LatencyRow) -> tuple[float, float, float]:
        ratio = row["ratios"]["our fastest over NNCF"]
        return 1.0 / ratio["ratio"], 1.0 / ratio["interval"][1], 1.0 / ratio["interval"][0]

    def level(row: LatencyRow) -> str:
        time, low, high = of_peer(row)
        return f"{_holds(time <= 1.0 or low <= 1.0 <= high <= 1.05)}: {_middle(time, low, high)}"

    def ahead(row: LatencyRow) -> str:
        time, low, high = of_peer(row)
        return f"{_holds(time <= 0.85)}: {_middle(time, low, high)}"

    aims: dict[str, Callable[[LatencyRow], str]] = {
        "ort >= 2x its own FP32": at_least("ort over its own FP32", 2.0),
        "our fastest >= 2.2x the best FP32 (3x at batch 8)": best,
    }
    if with_peer:
        aims["time of our fastest over NNCF's <= 1.00, or an interval that holds 1.00 and ends by 1.05"] = level
        aims["time of our fastest over NNCF's <= 0.85"] = ahead
    return aims


def _parity(entry: ParityRow) -> list[str]:
    shares = (entry["checkpoint"], entry["value"], entry["agreement"])
    return [
        entry["engine"],
        *("none" if share is None else f"{100 * share:.2f}" for share in shares),
        f"{entry['mean_abs']:.4f} ({entry['mean_tolerance']:.4f})",
        "passed" if entry["passed"] else "FAILED",
    ]


def _texts(text: TextRecord) -> Cells:
    """A row for every engine and order, and one for every peer, which is paired with our fastest engine and order."""
    rows = [
        [
            row["name"],
            row["order"] + (f" {text['fixed']}" if row["order"] == "fixed" else ""),
            f"{row['padding']:.0%}",
            _middle(row["sentences_per_second"], *row["quartiles"], digits=0),
            "1" if row["speedup"] is None or row["interval"] is None else _middle(row["speedup"], *row["interval"]),
            f"{row['without_tokenisation']:.0f}",
        ]
        for row in text["timings"]
    ]
    seconds = {name: np.array(taken) for name, taken in text["seconds"].items()}
    ours = [f"{row['name']} {row['order']}" for row in text["timings"]]
    best = min(ours, key=lambda name: float(np.median(seconds[name])))
    for name in (name for name in seconds if name not in ours):
        low, middle, high = np.percentile(text["sentences"] / seconds[name], [25, 50, 75])
        ratio, interval = paired(seconds[name], seconds[best])
        ahead = f"{best} is {_middle(ratio, *interval)} times as fast"
        rows.append([name, "its own", "–", _middle(middle, low, high, digits=0), ahead, "–"])
    return rows


def _embeddings(record: EmbeddingRecord) -> Cells:
    """The rows of `_texts`, with the cosine of each engine in front of what only ours have."""
    rows = _texts(record["text"])
    return [[*row[:2], f"{record['cosine'][row[0]]:.4f}", *row[3:5]] for row in rows if not row[1].startswith("fixed")]


def _profile(entry: ProfileRow) -> list[str]:
    total = sum(entry["milliseconds"].values())
    top = list(entry["milliseconds"].items())[:6]
    shares = ", ".join(f"{operator} {100 * ms / total:.0f} %" for operator, ms in top)
    return [entry["engine"], f"{entry['batch']}x{entry['sequence']}", f"{total:.2f}", shares]


def _products(entry: ProfileRow, reached: float) -> list[str]:
    """GOPS of the INT8 products of a profile, those that they reach alone and the share of it, and their share of the
    profile's time."""
    share = entry["milliseconds"]["MatMulIntegerToFloat"] / sum(entry["milliseconds"].values())
    alone = entry.get("int8_gops_alone")
    of_peak = ["not measured", "–"] if alone is None else [f"{alone:.0f}", f"{reached / alone:.0%}"]
    return [f"{entry['batch']}x{entry['sequence']}", f"{reached:.0f}", *of_peak, f"{share:.0%}"]


def _holds(holds: bool) -> str:
    return "holds" if holds else "MISSED"


def _ratio(ratio: Ratio) -> str:
    return _middle(ratio["ratio"], *ratio["interval"])


def _middle(value: float, low: float, high: float, *, digits: int = 2) -> str:
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
