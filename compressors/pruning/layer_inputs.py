"""Second moments ``E[x x^T]`` of what layers read, padding excluded: all that layer-wise pruning knows of the data.

Samples are streamed, and each runs only as far as the last of the layers that are asked for. So a caller that asks
block by block holds the moments of one block at a time, whatever the number of blocks and samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from nxm_export.data.features import Features
from nxm_export.errors import DataError

_SPARE = 20  # of so many texts one is held out, and not calibrated on
Batches = Sequence[Mapping[str, Tensor]]
Layer = TypeVar("Layer", bound=nn.Module)


def second_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, *, diagonal: bool = False
) -> dict[str, Tensor]:
    """``E[x x^T]`` (in, in) of what every one of `layers` of `model` reads, by name, or its diagonal (in,).

    Layers that read one tensor get one tensor; it is on the model's device. The mean is over real tokens, and over the
    runs of a layer that runs several times. Raises `DataError` without any token, for a layer that never runs, and for
    inputs that are no numbers.
    """
    watch, device = _Watch(diagonal), next(model.parameters()).device
    handles = [layer.register_forward_pre_hook(watch.before(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
                watch.start(inputs["attention_mask"].bool())
                try:
                    model(**inputs)
                except _Enough:
                    continue
                watch.ran_to_the_end(layers)
    finally:
        for handle in handles:
            handle.remove()
    return watch.moments(layers)


def by_block(layers: Mapping[str, Layer], blocks: Iterable[str]) -> list[dict[str, Layer]]:
    """`layers`, by weight name, of each of the `blocks`, by module path, that has any."""
    parts = [{name: layer for name, layer in layers.items() if name.startswith(f"{block}.")} for block in blocks]
    return [part for part in parts if part]


def count_with_tokens(samples: Iterable[Features], tokens: int) -> int:
    """How many of `samples`, from the first on, hold so many `tokens`, or all have; a text that comes again holds none:
    its inputs are known."""
    known, held, count = set[tuple[int, ...]](), 0, 0
    for sample in samples:
        if held >= tokens:
            break
        text, count = tuple(sample["input_ids"]), count + 1
        held += 0 if text in known else len(text)
        known.add(text)
    return count


def require_enough_tokens(widths: Mapping[str, int], samples: Iterable[Features]) -> None:
    """Raise `DataError` where the texts of `samples`, each counted once, have fewer tokens than the widest layer has
    inputs; `widths` are numbers of inputs by weight name.

    Its moments then leave directions open in which any change of its weights looks free of cost.
    """
    texts = {tuple(sample["input_ids"]) for sample in samples}
    tokens = sum(map(len, texts))
    name, needed = max(widths.items(), key=lambda item: item[1])
    if tokens < needed:
        about = -(-_SPARE * needed * len(texts) // max(_SPARE * tokens - tokens, 1))
        raise DataError(
            f"the calibration texts have {tokens} tokens, {name} reads {needed} values, and needs at least as many "
            f"tokens: give about {about} different texts like these (different ones read: {len(texts)}); "
            "--recipe obs takes fewer, and ends far from the dense model"
        )


def never_runs(weight: str) -> DataError:
    """The error for a layer that no text reaches."""
    return DataError(
        f"{weight} never runs when the model reads text, so nothing is known of its inputs; leave it out with "
        f"--keep-dense '{weight}'"
    )


class _Enough(Exception):
    """Every layer that is watched has read its input: the rest of the model need not run."""


class _Watch:
    """Sums of a pass over the samples. The first batch runs to the end and tells how often each layer runs."""

    def __init__(self, diagonal: bool) -> None:
        self.diagonal = diagonal
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}
        self.leaders: dict[str, str] = {}  # of a layer the first one that reads the same tensor
        self.expected: Counter[str] | None = None
        self.runs: Counter[str] = Counter()
        self.real = torch.empty(0)
        self.last: tuple[Tensor, str] | None = None

    def start(self, real: Tensor) -> None:
        """A batch begins; `real` (batch, sequence) is False for padding."""
        self.real, self.last, self.runs = real, None, Counter()
        self.tokens += int(real.sum())

    def before(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """The hook of a layer."""

        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            reads_the_same = self.last is not None and self.last[0] is x
            owner = self.last[1] if reads_the_same and self.last is not None else name
            self.last = (x, owner)
            if self.leaders.setdefault(name, owner) == name:
                self._add(name, x[self.real].float())
            self.runs[name] += 1
            if self.runs == self.expected:
                raise _Enough

        return hook

    def _add(self, name: str, x: Tensor) -> None:
        """Count values x (tokens, in)."""
        if self.diagonal:
            self.sums[name] = x.square().sum(dim=0) + self.sums.get(name, 0.0)
        else:
            self.sums[name] = x.T @ x if name not in self.sums else torch.addmm(self.sums[name], x.T, x)

    def ran_to_the_end(self, layers: Iterable[str]) -> None:
        """A batch is through; every layer has run by now."""
        silent = [name for name in layers if not self.runs[name]]
        if silent:
            raise never_runs(silent[0])
        self.expected = self.runs

    def moments(self, layers: Iterable[str]) -> dict[str, Tensor]:
        """The means, by layer."""
        if not self.tokens or self.expected is None:
            raise DataError("the calibration texts hold no token that is not padding; give at least one")
        means = {name: total / (self.tokens * self.expected[name]) for name, total in self.sums.items()}
        for name, mean in means.items():
            if not bool(torch.isfinite(mean).all()):
                raise DataError(
                    f"{name} reads NaN or infinite values on the calibration texts; "
                    "the model is broken before compression"
                )
        return {name: means[self.leaders[name]] for name in layers}
