"""``python -m nxm_export`` is ``nxm``."""

from nxm_export.cli import main

main()
