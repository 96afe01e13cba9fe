"""`torchrun` with two gloo processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def in_two_processes(module: str, *arguments: str) -> None:
    """Run ``python -m module arguments`` as two processes of one job; fails with what they wrote where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [sys.executable, *launch, "-m", module, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
