"""Developers' scripts: checks, release, benchmarks, experiments, result records, evidence from GPUs.

The product never imports them, and they import no tests. Run them from the repository's root: ``python -m tools.NAME``.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
