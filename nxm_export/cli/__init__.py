"""The command line ``nxm``: one thin command per stage. Parse, one call, print.

stdout is the result, stderr the progress; ``--json`` prints the result for machines. Exit codes: 0 done, 1 an error
that says what to do, 2 wrong usage, 3 a gate failed. Heavy imports stand inside the commands, so that ``--help`` is
instant.
"""

import sys

from nxm_export.errors import NxmError
from nxm_export.own_packages import require_own_packages

try:
    require_own_packages()  # before anything imports them: the commands take their options from `compressors`
except NxmError as error:
    sys.exit(f"nxm: {error}")


from nxm_export.cli import building, engines, graphs, predicting, reports, serving, timing, training  # noqa: F401  (their commands join the group)
from nxm_export.cli.group import main

__all__ = ["main"]
