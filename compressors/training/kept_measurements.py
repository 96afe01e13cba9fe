"""What is measured before the first step, kept in a work directory: an interrupted run does not measure it again.

The directory belongs to one request (`compressors.training.resume`), so a file that is there is of the same model,
samples, plan and settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from compressors import distributed
from nxm_export.storage.atomic import make_directory, write_atomic
from nxm_export.storage.json_files import encode, read_record

SCHEMA = "nxm-measured/1"


@dataclass(frozen=True)
class _Measured:
    values: Mapping[str, float]


def kept(file: Path, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The numbers by name in `file`, or those that `measure` returns, which the first process writes there.

    Numbers that are not finite are not kept: JSON has none.
    """
    if file.is_file():
        return dict(read_record(file, _Measured, schema=SCHEMA, way_out="remove it, and it is measured again").values)
    values = measure()
    if not distributed.rank() and all(map(math.isfinite, values.values())):
        make_directory(file.parent)
        write_atomic(file, encode(_Measured(values), SCHEMA))
    return values
