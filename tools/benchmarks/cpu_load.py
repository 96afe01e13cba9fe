"""What loading an engine takes: run in a process of its own by `tools.benchmarks.cpu_engines`.

python -m tools.benchmarks.cpu_load ENGINE THREADS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from engines.base import LoadOptions, backend
from engines.benchmark.latency import feeds_for
from engines.passport import load_passport
from engines.serving.memory import return_freed
from tools.benchmarks.cpu_record import Load
from tools.benchmarks.measuring import resident_bytes


def loading(directory: Path, threads: int) -> Load:
    """Seconds from the directory to a first answer at every compiled shape and one short text, the runtime imported
    before, and the memory that stays."""
    passport = load_passport(directory)
    runtime = backend(passport.backend)
    runtime.load(directory, LoadOptions(threads)).close()  # imports, and file pages that the first load reads
    return_freed()
    before, began = resident_bytes(), time.perf_counter()
    with runtime.load(directory, LoadOptions(threads)) as engine:
        for shape in (*passport.shapes, (1, 8)):
            engine.run(feeds_for(engine, *shape, 1000, 0))
        seconds = time.perf_counter() - began
        return_freed()
        return {"seconds": seconds, "bytes": resident_bytes() - before}


if __name__ == "__main__":
    print(json.dumps(loading(Path(sys.argv[1]), int(sys.argv[2]))))
