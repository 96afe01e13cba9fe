"""The head of a page of docs/gpu: what ran where, when, on which versions, and where the raw numbers lie.

Standard library and the driver alone: one of the tools runs where nothing else is installed.
"""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from engines.tensorrt.cuda_driver import device_facts
from nxm_export.errors import NxmError
from nxm_export.storage.atomic import write_atomic
from tools import provenance

REHEARSAL = "A rehearsal on the CPU: nothing of this is about a GPU."


def write_page(
    out: Path, what: str, gpu: str, facts: Mapping[str, str], sections: Sequence[str], raw: Sequence[str]
) -> Path:
    """Write ``<gpu>-<what>.md`` to the folder `out`; `facts` are versions, `raw` the files of raw numbers beside it.

    On a stand-in the page begins with that.
    """
    name = "-".join(gpu.lower().split())
    lines = [f"# {what.capitalize()} on {gpu}", ""]
    if not _is_gpu(gpu):
        lines += [f"**{REHEARSAL}**", ""]
    known = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": f"`{shlex.join(['python3', *sys.orig_argv[1:]])}`",
        "commit": _commit(),
        "machine": platform.platform(),
        "Python": platform.python_version(),
        **({"driver": _driver()} if _is_gpu(gpu) else {}),
        **facts,
    }
    lines += ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in known.items()), ""]
    lines += [f"Raw numbers: {', '.join(f'[{file}]({file})' for file in raw)}.", ""]
    page = out / f"{name}-{what}.md"
    write_atomic(page, "\n".join(lines) + "\n" + "\n\n".join(section.strip("\n") for section in sections) + "\n")
    return page


def as_text(lines: Sequence[str]) -> str:
    """Lines as they are, in a block of their own."""
    return "\n".join(["```text", *lines, "```"])


def _is_gpu(gpu: str) -> bool:
    return gpu != "stand-in"


@cache
def _commit() -> str:
    return provenance.versions(())["commit"]


@cache
def _driver() -> str:
    try:
        return device_facts()["driver"]
    except NxmError:
        return "unknown"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
