"""What numbers depend on: versions of packages, the commit of this tree, the machine."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from importlib.metadata import version

from tools import ROOT


def versions(names: Sequence[str], commit: str | None = None) -> dict[str, str]:
    """Of these packages, and the commit of this tree; ``-dirty`` where more than records and documents were changed
    since. A tree that lies somewhere without its history is of the `commit` that is given."""
    known = {name: version(name) for name in names}
    if commit is not None:
        return known | {"commit": commit}
    commit = _git("describe", "--always", "--exclude=*")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!docs")
    return known | {"commit": f"{commit or 'unknown'}{'-dirty' if changed else ''}"}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a machine without git
        return ""
