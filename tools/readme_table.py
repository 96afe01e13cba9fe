"""Print the result table of the README from a run directory; ``--write`` puts it into the README.

python tools/readme_table.py runs/demo --write
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- result table -->\n", "<!-- end of result table -->\n"


def table(run: Path) -> str:
    """The markdown table of a finished run, every number from a file in it."""
    from nxm_export.contract.run_summary import read_summary

    summary = read_summary(run).to_dict()
    device = json.loads((run / "engines" / "ort-cpu-int8" / "passport.json").read_text(encoding="utf-8"))["device"]
    rows = [
        ("", "dense, FP32", " and ".join(summary["plan"])),
        ("---", "---", "---"),
        *_quality(summary),
        *_size(summary),
        *_latency(summary, device),
        *_rtx(summary),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _quality(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    low, high = (f"{bound * 100:+.1f}" for bound in summary["difference_interval"])
    parity = summary["parity"]
    return [
        (
            f"{summary['metric']}, {summary['dev_samples']} held-out sentences",
            f"{summary['dense']:.4f}",
            f"{summary['compressed']:.4f} (difference {low} to {high} points, 95 % paired)",
        ),
        (
            "engine and its checkpoint in PyTorch choose the same class",
            f"{parity['ort-cpu-fp32']['agreement']:.2%}",
            f"{parity['ort-cpu-int8']['agreement']:.2%}",
        ),
    ]


def _size(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    embeddings = "word embeddings in INT8" if summary.get("embedding") == "int8" else "embeddings stay FP32"
    compression, size = summary["compression"], {name: value / 1e6 for name, value in summary["onnx_bytes"].items()}
    return [
        (
            "encoder matrices: bits saved against FP32",
            "",
            f"{compression['hw']:.1%} as tensor cores store 2:4, with index and scales; {compression['packed']:.1%} packed; "
            f"{compression['values']:.1%} counting kept values alone",
        ),
        (
            "ONNX file",
            f"{size['dense']:.1f} MB",
            f"{size['cpu']:.1f} MB for the CPU ({embeddings}), {size['trt']:.1f} MB for TensorRT (FP16)",
        ),
    ]


def _latency(summary: dict[str, Any], device: dict[str, str]) -> list[tuple[str, str, str]]:
    ratios = {(r["name"], r["batch"], r["sequence"]): r for r in summary["speedup"]}
    rows = []
    for name, timing in summary["latency_ms"].items():
        if name.startswith("ort-cpu-fp32 "):
            shape = timing["batch"], timing["seq"]
            ratio = ratios[("ort-cpu-int8", *shape)]
            other = summary["latency_ms"][name.replace("fp32", "int8")]
            rows.append(
                (
                    f"ONNX Runtime, batch {shape[0]} x {shape[1]} tokens, {device.get('name', 'unknown CPU')}",
                    f"{timing['median']:.1f} ms",
                    f"{other['median']:.1f} ms ({ratio['speedup']:.2f}x, {ratio['interval'][0]:.2f} to {ratio['interval'][1]:.2f})",
                )
            )
    return rows


def _rtx(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    rtx = summary.get("trt_rtx")
    if not rtx:
        return [("TensorRT-RTX engine", "", "not built on this machine")]
    integer = f"{rtx['integer_products']} of {rtx['planned_products']} matrix products in INT8"
    sparse = str(rtx["sparse_kernels"])
    return [("TensorRT-RTX engine", "", f"built: {integer}; sparse kernels {sparse}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    made = table(chosen.run)
    if not chosen.write:
        print(made, end="")
        return
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}{made}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
