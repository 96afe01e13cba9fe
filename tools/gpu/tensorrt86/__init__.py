"""TensorRT 8.6.0 on a machine without network: carried in chunks, put together there, and asked for evidence.

    python -m tools.gpu.tensorrt86.pack                     here, once: about 25 minutes of one core, 6 chunks
    python3 -m tools.gpu.tensorrt86.unpack c01              there, with each chunk that arrived
    python3 -m tools.gpu.tensorrt86.evidence --budget 330   there, when nothing is missing

Why chunks: only what lies in the repository's folder travels, and no more than 64 MiB at a time. Why a Python of its
own: the 8.6 wheel stops at Python 3.10, and that machine's torch is in 3.12; graphs are made by one and built by the
other.
"""

from pathlib import Path

from tools import ROOT

FOLDER = ROOT / ".trt86"  # ignored by git; chunks travel in it
MANIFEST = FOLDER / "manifest.json"
PLACE = Path("/tmp/nxm-trt86")  # where it is put together
PYTHON310 = PLACE / "python310"  # a script that starts the carried Python
SITE312 = PLACE / "site312"  # what the machine's own Python lacks
VERSION = "8.6.0"
BASE = "base"
LIBRARIES = ("libnvonnxparser.so.8", "libnvinfer.so.8", f"libnvinfer_builder_resource.so.{VERSION}")
