"""Count the names of sparse kernels in TensorRT libraries: the source of engines/sparsity/sparse_kernels.json.

    python -m tools.gpu.sparse_kernels /path/to/libnvinfer_builder_resource.so.8.6.0 [more libraries]

Reads text only and runs nothing. A name says architecture, form and types: ``sm80_xmma_sparse_gemm_i8i8_i8i32_f32``
takes INT8 (first i8), writes INT8 (second i8) and accumulates in i32. A kernel that is named may still never be chosen,
and one named for sm80 may have been compiled for later GPUs, too.
"""

from __future__ import annotations

import argparse
import mmap
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

_NAME = re.compile(rb"(?:sm\d+_xmma_[a-z0-9_]*sparse[a-z0-9_]*|cutlass3x_sm\d+_sptensorop_[a-z0-9_]*)")
_TAIL = re.compile(r"_(?:tilesize|\d+x\d+x\d+_).*")


def count(library: Path) -> Counter[str]:
    """Kernel names without their tile sizes, with how many of each there are."""
    names: set[str] = set()
    with library.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        names.update(match[0].decode() for match in _NAME.finditer(data))
    return Counter(_TAIL.sub("", name) for name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", type=Path, nargs="+")
    for library in parser.parse_args(arguments).libraries:
        if not library.is_file():
            print(f"{library}: no such file", file=sys.stderr)
            return 1
        print(library.name)
        for name, number in sorted(count(library).items()):
            print(f"{number:6d}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
