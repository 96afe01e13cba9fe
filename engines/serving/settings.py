"""How engines are served, by `nxm serve` or by Triton: addresses, limits, deadlines. Loads nothing.

A field with an `Option` is an option of the command line, too (`nxm_export.contract.options`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nxm_export.contract.choices import GATE, GATES
from nxm_export.contract.options import OPTION, Option
from nxm_export.contract.token_budget import BATCH_TOKENS_HELP, MAX_BATCH_TOKENS, MAX_ROWS

INSTANCE_KINDS = ("cpu", "gpu")
# The container of Triton 2.51, the release whose core loads these repositories in the tests.
TRITON_IMAGE = "nvcr.io/nvidia/tritonserver:24.10-py3"
_MILLISECONDS = 1e3  # in a second
_MEBIBYTES = 2.0**-20  # in a byte


@dataclass(frozen=True)
class ModelOptions:
    """How engines are served. None lets the engine decide: `instances` and `threads` from the cores, `lengths` from its
    profiles, `merge` (rows that different requests make a batch of) from its device. `max_batch_tokens` bounds rows x
    tokens of every batch. `max_delay` is in seconds. `expect_sha256` not empty means that the hash of every engine, or
    of all its contents, must be among them."""

    instances: int | None = field(
        default=None, metadata={OPTION: Option("Copies of each engine.  [default: CPU cores; 1 on a GPU]", least=1)}
    )
    threads: int | None = field(
        default=None, metadata={OPTION: Option("CPU threads of each copy.  [default: cores / instances]", least=1)}
    )
    max_batch: int = field(default=MAX_ROWS, metadata={OPTION: Option("Rows of a request.", least=1)})
    max_batch_tokens: int = field(default=MAX_BATCH_TOKENS, metadata={OPTION: Option(BATCH_TOKENS_HELP, least=1)})
    merge: int | None = field(
        default=None,
        metadata={
            OPTION: Option(
                "Rows of different requests in a batch.  [default: 4 on a CPU, and 2048 tokens; else --max-batch]",
                least=1,
            )
        },
    )
    lengths: tuple[int, ...] | None = None
    max_queue: int = field(default=512, metadata={OPTION: Option("Rows that may wait.", least=1)})
    max_delay: float = field(
        default=0.0,
        metadata={OPTION: Option("Wait for company.", flag="--max-delay-ms", least=0, scale=_MILLISECONDS)},
    )
    text: bool = field(default=False, metadata={OPTION: Option("Serve NAME_text, too: sentences in, class names out.")})
    gate: str = field(
        default=GATE,
        metadata={OPTION: Option("Which parity.json an engine must have.", flag="--parity", choices=GATES)},
    )
    expect_sha256: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RequestLimits:
    """`max_body` in bytes; `timeout` in seconds, of a request that sets none and the longest that one may set."""

    max_body: int = field(
        default=4 << 20,
        metadata={OPTION: Option(flag="--max-body-mb", least=0.001 / _MEBIBYTES, scale=_MEBIBYTES)},
    )
    timeout: float = field(
        default=10.0, metadata={OPTION: Option("Deadline.", flag="--timeout-ms", least=1e-3, scale=_MILLISECONDS)}
    )


@dataclass(frozen=True)
class ConnectionLimits:
    """`connections` at once; `read_timeout` seconds for a request to arrive whole; `head` bytes of request line and
    headers."""

    connections: int = field(default=512, metadata={OPTION: Option(flag="--max-connections", least=1)})
    read_timeout: float = field(
        default=10.0,
        metadata={
            OPTION: Option("For a request to arrive.", flag="--read-timeout-ms", least=1e-3, scale=_MILLISECONDS)
        },
    )
    head: int = 32 << 10


@dataclass(frozen=True)
class ServerOptions:
    """Where and how a server listens. `drain` is how many seconds a stop waits for what is under way, `shutdown_delay`
    how many it goes on taking connections before, not ready, `watch` how often engine directories are looked at (0:
    never)."""

    host: str = field(default="127.0.0.1", metadata={OPTION: Option()})
    port: int = field(default=8000, metadata={OPTION: Option("0 takes a free one.", least=0, most=65535)})
    allow_remote: bool = field(
        default=False, metadata={OPTION: Option("Listen beyond this machine. There is no authentication.")}
    )
    drain: float = field(
        default=30.0,
        metadata={
            OPTION: Option(
                "How long a stop waits for answers, after --shutdown-delay-seconds.", flag="--drain-seconds", least=0
            )
        },
    )
    shutdown_delay: float = field(
        default=0.0,
        metadata={
            OPTION: Option(
                "How long to take new requests, not ready, after SIGTERM.", flag="--shutdown-delay-seconds", least=0
            )
        },
    )
    watch: float = field(
        default=2.0, metadata={OPTION: Option("Look for changed engines; 0 never.", flag="--watch-seconds", least=0)}
    )
    access_log: bool = field(default=False, metadata={OPTION: Option("Log every inference request.")})
    requests: RequestLimits = RequestLimits()
    connections: ConnectionLimits = ConnectionLimits()


@dataclass(frozen=True)
class TritonOptions:
    """How a repository for Triton is written. `kind` (cpu or gpu) is by default what the engine runs on; `threads` are
    those of an ONNX Runtime instance on a CPU; `tensorrt` is the version in the target container, where it is known
    already."""

    gate: str = field(
        default=GATE,
        metadata={OPTION: Option("Which parity.json an engine must have.", flag="--parity", choices=GATES)},
    )
    expect_sha256: frozenset[str] = frozenset()
    text: bool = field(default=False, metadata={OPTION: Option("Add NAME_text: sentences in, class names out.")})
    pair: bool = field(
        default=False, metadata={OPTION: Option("The same, and text_pair must be there.", flag="--pairs")}
    )
    kind: str | None = field(
        default=None, metadata={OPTION: Option("Where instances run.  [default: as built]", choices=INSTANCE_KINDS)}
    )
    instances: int = field(default=1, metadata={OPTION: Option(least=1)})
    threads: int | None = field(
        default=None, metadata={OPTION: Option("CPU threads of an ONNX Runtime instance.", least=1)}
    )
    max_batch: int = field(default=MAX_ROWS, metadata={OPTION: Option("Rows of a batch.", least=1)})
    max_batch_tokens: int = field(
        default=MAX_BATCH_TOKENS,
        metadata={OPTION: Option(f"Of an engine without profiles, at its longest input. {BATCH_TOKENS_HELP}", least=1)},
    )
    image: str = TRITON_IMAGE
    tensorrt: str | None = field(
        default=None,
        metadata={
            OPTION: Option(
                "TensorRT in that container; refuse engines that need another.",
                flag="--container-tensorrt",
                metavar="X.Y.Z",
            )
        },
    )
