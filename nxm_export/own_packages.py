"""The three packages of this project belong together: `compressors` and `engines` must be those that came with
`nxm_export`.

Their names are plain, and Python takes the first that it meets: a folder ``engines`` with an ``__init__.py`` (or a
file ``engines.py``) in the directory that Python was started in stands before the installed package. Unnoticed, that
ends in an error about a module that does not exist.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from nxm_export.errors import NxmError

PACKAGES = ("compressors", "engines")
_HOME = Path(__file__).resolve().parent.parent


def require_own_packages() -> None:
    """Raise `NxmError` where `compressors` or `engines` would be imported from elsewhere than beside `nxm_export`.

    Looks for them without importing anything, which takes well under a millisecond.
    """
    for name in PACKAGES:
        place = _place_of(name)
        if place is None:
            raise NxmError(f"{name}, a package of nxm-export, is missing in {_HOME}: install nxm-export again")
        if place != _HOME / name:
            kind = "file" if place.is_file() else "folder"
            raise NxmError(
                f"{name} is {place}, not the package of nxm-export in {_HOME}: rename that {kind} or run from another "
                "directory"
            )


def _place_of(name: str) -> Path | None:
    """The folder of a package as Python would import it, or a module's file; None where there is none."""
    module = sys.modules.get(name)
    try:
        spec = find_spec(name) if module is None else module.__spec__
    except ValueError:  # something without a spec was put into sys.modules
        spec = None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin else None
