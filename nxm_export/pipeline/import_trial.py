"""Whether a library can be imported, tried in a process of its own: a broken one may end the process that tries, and
one that works takes memory for as long as that process lives."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import cache

_PATIENCE = 120.0  # seconds: from a slow disk a library of some hundred megabytes takes many
# What the library itself prints goes away; on the last line stands why it cannot be imported.
_TRIAL = """
import importlib, sys
sys.path[:] = {path!r}
try:
    importlib.import_module({module!r})
except BaseException as error:
    print()
    print(type(error).__name__ + ":", " ".join(str(error).split())[:300])
    sys.exit(1)
"""


def import_problem(module: str) -> str | None:
    """What stops the import of a module here, in a line; None where it can be imported."""
    return None if module in sys.modules else _tried(module, tuple(sys.path))


@cache
def _tried(module: str, path: tuple[str, ...]) -> str | None:
    command = [sys.executable, "-c", _TRIAL.format(path=list(path), module=module)]
    try:
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=False, close_fds=True
        )
    except subprocess.TimeoutExpired:
        return f"importing it did not end in {_PATIENCE:g} seconds"
    except OSError as error:
        return f"no process could be started to try it: {error}"
    if child.returncode == 0:
        return None
    if child.returncode < 0:
        return f"importing it ends the process ({signal.Signals(-child.returncode).name})"
    said = child.stdout.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"importing it ends the process (exit code {child.returncode})"
