"""The section of docs/performance.md that `tools.bench_cpu` writes from its record: tables, what was wanted, what lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from engines.benchmark.latency import paired

PEER = "INT8 dense by NNCF, openvino"


def section(record: Mapping[str, Any]) -> str:
    """The section of a record: tables, what was wanted and whether it holds, and what lost."""
    machine, found = record["machine"], record["versions"]
    shapes = [f"{row['batch']}x{row['sequence']}" for row in record["latency"]]
    parts = [
        _HEAD.format(
            machine=f"{machine.get('name', 'unknown')}, {machine.get('features', '')}, {machine['threads']} threads on {machine['cores']} cores",
            versions=", ".join(f"{name} {number}" for name, number in found.items()) + (f"; peer: {record['peer']}" if record["peer"] else ""),
            plan=", ".join(f"{count} x {option}" for option, count in record["model"]["plan"].items()),
            load=f"{record['load_average_before']:.2f}",
            seconds=record["seconds"],
        ),
        "### Latency\n\nMilliseconds, median (middle half), batch x sequence, random tokens, no padding.\n",
        _table(
            ["engine", "MB", *shapes],
            [
                [name, _megabytes(record, name)]
                + [f"{row['median_ms'][name]:.2f} ({row['quartiles_ms'][name][0]:.2f} to {row['quartiles_ms'][name][1]:.2f})" for row in record["latency"]]
                for name in record["latency"][0]["median_ms"]
            ],
        ),
        "Speed-ups, medians of paired ratios with their 95 % intervals; above 1 is faster.\n",
        _table(["speed-up", *shapes], [[what] + [_ratio(row["ratios"][what]) for row in record["latency"]] for what in record["latency"][0]["ratios"]]),
        "### What was wanted, and whether it holds\n",
        _table(["wanted", *shapes], [[what] + [test(row) for row in record["latency"]] for what, test in _wanted(record).items()]),
        *_parity_part(record),
        *_text_part(record["text"], record["text_peers"]),
        *_profile_part(record),
    ]  # fmt: skip
    return "\n".join(parts).strip()


_HEAD = """{plan} of MiniLM-L6 on rotten tomatoes. Machine: {machine}; load average before: {load}. Versions: {versions}.

All engines are timed in one run, every round times each once in an order that rotates, after untimed runs of the same engine for 60 ms, and
ratios are paired within rounds; numbers of different runs are not to be compared. Float layers run in float32 everywhere: OpenVINO would choose bfloat16 on
this kind of CPU by itself, and its FP32 row would then be another network. The whole run took {seconds} s.

*Outputs too* is `--placement inputs-outputs`: query, key and value are then INT8, and what goes into the residual. *All products*
is `--placement products`: query, key, value and softmax are INT8, both products inside attention run on integers, and nothing
else is quantized. *Attention too* is `--placement attention`: all of these. The checkpoint was trained with all of these quantizers;
graphs of fewer leave out those that they do not name. *Our fastest* is the fastest of the INT8 2:4 rows at that shape, by its median.

2:4 gives no speed on a CPU with these runtimes: what is faster here is INT8. Losing cases stay in the tables.
"""


def _wanted(record: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    def at_least(what: str, limit: float) -> Callable[[Mapping[str, Any]], str]:
        def test(row: Mapping[str, Any]) -> str:
            return (
                f"{'holds' if row['ratios'][what]['ratio'] >= limit else 'MISSED'}: {row['ratios'][what]['ratio']:.2f}"
            )

        return test

    def best(row: Mapping[str, Any]) -> str:
        limit = 2.7 if row["batch"] > 1 else 2.2
        return at_least("our fastest over the best FP32", limit)(row) + f" of {limit}"

    def peer(row: Mapping[str, Any]) -> str:
        found = row["ratios"]["our fastest over NNCF"]
        time, high = 1.0 / found["ratio"], 1.0 / found["interval"][0]
        low = 1.0 / found["interval"][1]
        holds = time <= 1.0 or (low <= 1.0 <= high <= 1.05)
        return f"{'holds' if holds else 'MISSED'}: {time:.2f} ({low:.2f} to {high:.2f})"

    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "ort >= 2x its own FP32": at_least("ort over its own FP32", 2.0),
        "our fastest >= 2.2x the best FP32 (2.7x at batch 8)": best,
    }
    if record["peer"]:
        rows["time of our fastest over NNCF's <= 1.00, or an interval that holds 1.00 and ends by 1.05"] = peer
    return rows


def _parity_part(record: Mapping[str, Any]) -> list[str]:
    if not record["parity"]:
        return []
    rows = [
        [
            entry["engine"],
            f"{100 * entry['checkpoint']:.2f}",
            f"{100 * entry['value']:.2f}",
            f"{100 * entry['agreement']:.2f}",
            f"{entry['mean_abs']:.4f} ({entry['mean_tolerance']:.4f})",
            "passed" if entry["passed"] else "FAILED",
        ]
        for entry in record["parity"]
    ]
    columns = ["engine", "checkpoint in PyTorch", "engine", "same class, %", "mean difference of outputs (tolerated)", "gate drop<=0.5 and tolerance"]  # fmt: skip
    head = f"### The same engines against their checkpoint\n\n`nxm compare`, {record['parity'][0]['metric']} on {record['parity'][0]['samples']} dev sentences.\n"
    return [head, _table(columns, rows)]


def _text_part(text: Mapping[str, Any], versions: str | None) -> list[str]:
    head = (
        f"### Real text\n\n`nxm bench ENGINES --data dev.tsv`: {text['sentences']} sentences, {text['tokens'][0]:.1f} tokens on average, "
        f"{text['tokens'][1]} at most, in batches of {text['batch']}; {text['rounds']} interleaved rounds. The tokenizer alone makes "
        f"{text['tokenised_per_second']:.0f} sentences a second, and is included but in the last column.\n"
    )
    rows = [
        [
            row["name"],
            row["order"] + (f" {text['fixed']}" if row["order"] == "fixed" else ""),
            f"{row['padding']:.0%}",
            f"{row['sentences_per_second']:.0f} ({row['quartiles'][0]:.0f} to {row['quartiles'][1]:.0f})",
            "1" if row["interval"] is None else f"{row['speedup']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})",
            f"{row['without_tokenisation']:.0f}",
        ]
        for row in text["timings"]
    ]  # fmt: skip
    own = {f"{row['name']} {row['order']}" for row in text["timings"]}
    best = min((name for name in own if name.endswith(" bucketed")), key=lambda name: np.median(text["seconds"][name]))
    for name, seconds in text["seconds"].items():
        if name not in own:
            low, middle, high = np.percentile(text["sentences"] / np.array(seconds), [25, 50, 75])
            ratio, (start, end) = paired(np.array(seconds), np.array(text["seconds"][best]))
            ahead = f"{best} is {ratio:.2f} ({start:.2f} to {end:.2f}) times as fast"
            rows.append([name, "its own", "–", f"{middle:.0f} ({low:.0f} to {high:.0f})", ahead, "–"])
    columns = ["engine", "batches", "padding", "sentences a second", "against arrival order", "engine alone"]
    peers = (
        f"The peer rows are sentence embeddings of the dense model of the same size ({versions}), which has no classifier; all threads."
        if versions
        else "sentence-transformers with its INT8 backends was not installed where this was measured (NXM_TEXT_PEERS_PYTHON)."
    )
    return [
        head,
        _table(columns, rows),
        f"Wanted: bucketed >= 1.2x arrival order, and ahead of sentence-transformers. {peers}\n",
    ]


def _profile_part(record: Mapping[str, Any]) -> list[str]:
    rows, roof = [], []
    for entry in record["profile"]:
        total = sum(entry["milliseconds"].values())
        top = list(entry["milliseconds"].items())[:6]
        shape = f"{entry['batch']}x{entry['sequence']}"
        rows.append(
            [entry["engine"], shape, f"{total:.2f}", ", ".join(f"{op} {100 * ms / total:.0f} %" for op, ms in top)]
        )
        if entry.get("int8_gops"):
            share = entry["milliseconds"]["MatMulIntegerToFloat"] / total
            peak = record["peaks"]["int8_gops"]
            roof.append(
                [shape, f"{entry['int8_gops']:.0f}", f"{entry['int8_gops'] / peak:.0%}", f"{share:.0%}",
                 f"{entry['milliseconds']['MatMulIntegerToFloat'] * entry['int8_gops'] / peak + total * (1 - share):.2f}"]
            )  # fmt: skip
    peaks = record["peaks"]
    return [
        "### Where the time goes\n\nThe runtimes' own profiles, medians by operator (profiling itself adds some).\n",
        _table(["engine", "shape", "ms", "largest shares"], rows),
        f"Roofline of the INT8 products: a (2048, 2048) x (2048, 2048) product reaches {peaks['int8_gops']:.0f} GOPS in INT8 here, and {peaks['fp32_gops']:.0f} in FP32.\n",
        _table(["shape", "GOPS of the products", "of the peak", "products' share of the time", "ms if they ran at the peak"], roof),
    ]  # fmt: skip


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _ratio(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def _megabytes(record: Mapping[str, Any], name: str) -> str:
    return f"{record['bytes'][name] / 1e6:.1f}" if name in record["bytes"] else "–"
