"""Print the result table of the README from a run directory; ``--write`` puts it into the README.

python -m tools.readme_table runs/demo --write
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engines.passport import load_passport
from nxm_export.contract.records.run_summary import RunSummary, read_summary
from nxm_export.storage.atomic import write_atomic
from tools import ROOT
from tools.rendering import render

README = ROOT / "README.md"
BEGIN, END = "<!-- result table -->\n", "<!-- end of result table -->\n"


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of both ONNX Runtime engines at one shape, and the 95 % interval of their ratio in paired
    rounds."""

    batch: int
    tokens: int
    fp32_ms: float
    int8_ms: float
    low: float
    high: float


def table(run: Path) -> str:
    """The markdown table of a finished run, every number from a file in it."""
    summary = read_summary(run)
    low, high = (float("nan") if bound is None else 100 * bound for bound in summary.difference_interval)
    text = render(
        "readme_table.md.j2",
        summary=summary,
        low=low,
        high=high,
        megabytes={name: size / 1e6 for name, size in summary.onnx_bytes.items()},
        latencies=list(_latencies(summary)),
        cpu=load_passport(run / "engines" / "ort-cpu-int8").device.get("name", "unknown CPU"),
    )
    return f"{text}\n"


def _latencies(summary: RunSummary) -> Iterator[Latency]:
    ratios = {(ratio.name, ratio.batch, ratio.sequence): ratio for ratio in summary.speedup}
    timings = summary.latency_ms
    for name in (name for name in timings if name.startswith("ort-cpu-fp32 ")):
        batch, tokens = timings[name].batch, timings[name].seq
        ratio = ratios["ort-cpu-int8", batch, tokens]
        int8 = timings[name.replace("fp32", "int8")].median
        yield Latency(batch, tokens, timings[name].median, int8, *ratio.interval)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--write", action="store_true", help="write the table into the README")
    chosen = parser.parse_args()
    made = table(chosen.run)
    if not chosen.write:
        print(made, end="")
        return
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    write_atomic(README, f"{before}{BEGIN}{made}{END}{after}")


if __name__ == "__main__":
    main()
