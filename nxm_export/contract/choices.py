"""Choices and defaults that the command line shares with the functions behind it. Loads nothing.

What belongs to one settings class stands on its fields instead (`nxm_export.contract.options`).
"""

from typing import Literal, get_args

TASK = "classification"
TARGETS = ("cpu", "trt", "trt8")  # of a graph: `nxm_export.graph.targets.TARGETS` by name
TARGET = "cpu"
LOWERINGS = ("matmul", "gemm", "conv1x1")  # how a linear layer is written in a graph
LOWERING = "matmul"
WEIGHT_STORAGES = ("int8", "int4")  # of the integer weights of a graph; INT4 for those of 4 bits or fewer
WEIGHT_STORAGE = "int8"
INT4_BITS = 4
FLOAT_TYPES = ("float32", "float16", "bfloat16")  # of a graph
BACKEND_NAMES = ("ort", "openvino", "trt", "trt_rtx", "cusparselt")  # `engines.base.BACKENDS` by name
AUTO_BACKEND = "auto"  # the fastest of those on the CPU
BACKEND = "ort"
GATES = ("not-failed", "passed", "off")  # which parity.json an engine must have before it answers
GATE = "not-failed"
TENSORRT_BACKENDS = ("trt", "trt_rtx")
MAX_PROFILES = 3  # of an engine whose profiles come from data
# 2:4 kernels of a build: where they are faster, wherever there is one, nowhere.
SparseUse = Literal["auto", "always", "never"]
SPARSE_USES: tuple[SparseUse, ...] = get_args(SparseUse)
SPARSE_USE: SparseUse = "auto"
# What an ONNX file is judged for: of each backend, the version that most is known of, and the GPU.
TENSORRT_VERSIONS = {"trt": "11.4", "trt_rtx": "1.7"}
COMPUTE_CAPABILITY = "8.9"
BENCH_SHAPES = ((1, 32), (8, 64))  # (batch, sequence)
BENCH_ROUNDS = 30
TEXT_BATCH = 32  # sentences
HINTS = ("latency", "throughput")  # what an engine on the CPU is loaded for: one answer soon, or many answers
HINT = "latency"
LOAD_ROUNDS = 3
TEXT_ROUNDS = 7
TOKEN_ENCODINGS = ("binary", "json")  # of a request's tensors
TOKEN_ENCODING = "binary"
# The plan that every matrix gets where no other is given.
PATTERN = "2:4"
WEIGHT_BITS = 8
PLACEMENT = "inputs-outputs"
STORAGES = ("float", "int8")  # of attention, of the residual connections, of the word-embedding table
STORAGE = "float"
