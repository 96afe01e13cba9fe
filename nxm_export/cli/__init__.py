"""The command line ``nxm``: one thin command per stage. Parse, one call, print.

stdout is the result, stderr the progress; ``--json`` prints the result for machines. Exit codes: 0 done, 1 an error that
says what to do, 2 wrong usage, 3 a gate failed. Heavy imports stand inside the commands, so that ``--help`` is instant.
"""

from nxm_export.cli import engines, graphs, reports, serving, training  # noqa: F401  (their commands join the group)
from nxm_export.cli.group import main

__all__ = ["main"]
