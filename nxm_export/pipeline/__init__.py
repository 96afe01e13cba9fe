"""All stages in a row (`nxm run`), and the commands that work on several engines at once."""

from nxm_export.own_packages import require_own_packages

require_own_packages()  # what is in here imports `compressors` and `engines`
