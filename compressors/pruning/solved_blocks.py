"""What layer-wise solving has finished, block by block on disk: interrupted work goes on from there.

Solving a base-size model takes minutes on a CPU. A block that was solved is read back bit by bit, so that a resumed run
ends where an uninterrupted one does, whatever the number of its threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from compressors.pruning.layerwise import Solution
from compressors.work_files import read_tensors, write_tensors


class SolvedBlocks:
    """Files of solutions in a directory that belongs to one request (`compressors.training.resume`)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, block: int) -> dict[str, Solution] | None:
        """The solutions of a block by weight name, or None where it was not finished; raises `ArtifactError` for a file
        that is damaged."""
        file = self._file(block)
        if not file.is_file():
            return None
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in read_tensors(file, "it is solved again").items():
            name, _, part = key.rpartition("|")
            parts.setdefault(name, {})[part] = tensor
        return {
            name: Solution(of["latent"], of["weight"], of.get("mask"), of.get("scale"), float(of["error"]))
            for name, of in parts.items()
        }

    def write(self, block: int, solutions: Mapping[str, Solution]) -> None:
        """Keep the solutions of a finished block; the file is there as a whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, solution in solutions.items():
            optional = {"mask": solution.mask, "scale": solution.scale}
            tensors |= {f"{name}|{part}": tensor for part, tensor in optional.items() if tensor is not None}
            tensors[f"{name}|latent"] = solution.latent.clone()  # a weight without bits is the latent one itself
            tensors[f"{name}|weight"] = solution.weight
            tensors[f"{name}|error"] = torch.tensor(solution.error, dtype=torch.float64)
        write_tensors(self._file(block), tensors)

    def _file(self, block: int) -> Path:
        return self.directory / f"solved-{block}.safetensors"
