"""A dense model that a search looks into: what its layers read, how its loss bends, and what it answers from any block
on with other weights in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressors.quantization.autograd import ACTIVATION_QMAX, ACTIVATION_QMIN
from compressors.quantization.even_channels import channel_factors, largest_inputs
from compressors.quantization.observers import HistogramObserver
from compressors.training.output_divergence import real_logits
from nxm_export.contract.encoder_family import Family
from nxm_export.errors import DataError
from nxm_export.hf.protocols import TaskOutput

Batches = Sequence[Mapping[str, Tensor]]
InputScale = float | Tensor | None  # of all inputs of a layer, or of each (in,); None where they are not quantized


@dataclass(frozen=True)
class EvenedInput:
    """What a layer reads, divided by `factors` (in,), channel by channel, and the static INT8 scale of that."""

    factors: Tensor
    scale: float

    @property
    def steps(self) -> Tensor:
        """The distance between two codes (in,), in units of what comes in."""
        return self.factors * self.scale


@dataclass
class Statistics:
    """What one pass over the calibration samples tells about a weight's layer.

    `fisher` is the mean squared gradient of a sample's loss per output channel (out,), the sum over the runs of a layer
    that runs several times for one token (shared layers); `input_scale` the static INT8 scale of what it reads, and
    `evened` that of evened-out channels (`compressors.quantization.even_channels`), where there are any.
    """

    fisher: Tensor
    input_scale: float
    evened: EvenedInput | None = None


class SensitivityProbe:
    """A dense model whose planned layers can be compressed one-shot and put back."""

    def __init__(
        self, model: nn.Module, family: Family, config: Mapping[str, object], output_kind: str = "softmax"
    ) -> None:
        self.model, self.family, self.output_kind = model.eval(), family, output_kind
        self.weights = list(family.weights(config))
        self.blocks = family.blocks(config)
        self.device = next(model.parameters()).device
        runs = family.runs(config)
        # A model that runs a block more than once (shared layers) has no prefix that its weights leave alone.
        self.repeats = len(self.blocks) != len(runs)
        self.uses = {weight: runs.count(family.block_of(weight)) for weight in self.weights}

    def layer(self, weight: str) -> nn.Linear:
        """The linear layer of a weight."""
        layer = self.model.get_submodule(weight.removesuffix(".weight"))
        assert isinstance(layer, nn.Linear)
        return layer

    def statistics(
        self, batches: Batches, percentile: float | None, to_even: Sequence[Sequence[str]] = ()
    ) -> dict[str, Statistics]:
        """Stream the calibration samples (with labels) through the dense model once, forward and backward.

        Ranges of inputs reach to the `percentile` of |x|; None: those of least squared error. `to_even` are groups of
        weights that read one tensor each, whose channels can be evened out; that takes one more pass forward. Raises
        `DataError` for a model that is broken already: it names the weight that is, or that reads what is no number.
        """
        for weight in self.weights:
            if not bool(torch.isfinite(self.layer(weight).weight).all()):
                raise DataError(f"{weight} holds NaN or infinite values; the model is broken before compression")
        sums, directions = _Sums(self, self._factors(batches, to_even)), torch.Generator().manual_seed(0)
        with sums.watching():
            for batch in batches:
                inputs = {key: value.to(self.device) for key, value in batch.items()}
                sums.tokens = inputs["attention_mask"].bool()
                sums.count += int(sums.tokens.sum())
                self.model.zero_grad(set_to_none=True)
                loss = self._loss(self.model(**inputs), directions)
                if not bool(torch.isfinite(loss)):
                    raise DataError(
                        "the dense model's loss is no number on a calibration sample; check the model and its labels"
                    )
                # A sum over samples: each gets the gradient of its own loss.
                torch.autograd.backward(loss * len(inputs["input_ids"]))
        self.model.zero_grad(set_to_none=True)
        return sums.statistics(percentile)

    def _factors(self, batches: Batches, groups: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """By weight, what evens out its inputs (in,); without those whose channels need nothing."""
        if not groups:
            return {}
        largest = largest_inputs(self.model, [self.layer(names[0]) for names in groups], batches)
        found = {name: channel_factors(one) for names, one in zip(groups, largest, strict=True) for name in names}
        return {name: factors for name, factors in found.items() if bool((factors > 1).any())}

    @staticmethod
    def _loss(output: TaskOutput, directions: torch.Generator) -> Tensor:
        """The task's loss, a mean over samples. Embeddings have none; the mean squared gradient of a random direction's
        length then stands for how far all of the vector moves."""
        if output.loss is not None:
            return output.loss
        direction = torch.randn(output.logits.shape, generator=directions).to(output.logits.device)
        return (output.logits * direction).sum(-1).mean()

    @contextmanager
    def installed(self, weights: Mapping[str, tuple[Tensor, InputScale]]) -> Iterator[None]:
        """Inside the block, the given weights are in the model, and layers with a scale quantize their input."""
        with ExitStack() as stack:
            for name, (value, scale) in weights.items():
                layer = self.layer(name)
                stack.callback(setattr, layer.weight, "data", layer.weight.data)
                layer.weight.data = value.to(layer.weight.dtype)
                if scale is not None:
                    handle = layer.register_forward_pre_hook(
                        lambda _, args, scale=scale: (_quantized(args[0], scale), *args[1:])
                    )
                    stack.callback(handle.remove)
            yield

    @torch.no_grad()
    def outputs(self, batch: Mapping[str, Tensor], start: int = 0, hidden: Tensor | None = None) -> Tensor:
        """The model's first output for a batch (0 for tokens that are padding), from block `start` on if the hidden
        state before it is given."""
        inputs = {key: value.to(self.device) for key, value in batch.items() if key != "labels"}
        with self._starting_at(start, hidden):
            output: TaskOutput = self.model(**inputs)
        return real_logits(output.logits, inputs["attention_mask"], self.output_kind)

    @torch.no_grad()
    def hidden_before(self, batch: Mapping[str, Tensor], block: int) -> tuple[Tensor, Tensor]:
        """(hidden state (batch, sequence, features) that encoder block `block` reads, the model's first output)."""
        hidden: list[Tensor] = []
        handle = self.model.get_submodule(self.blocks[block]).register_forward_pre_hook(
            lambda _, args: hidden.append(args[0])
        )
        try:
            outputs = self.outputs(batch)
        finally:
            handle.remove()
        return hidden[0], outputs

    def _pass_on(self, hidden: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor | None, ...]:
        """What a block returns that changes nothing."""
        count = self.family.block_returns
        return hidden if count is None else (hidden, *[None] * (count - 1))

    @contextmanager
    def _starting_at(self, start: int, hidden: Tensor | None) -> Iterator[None]:
        """Skip the blocks before `start`: they pass on what they get, and block `start` reads `hidden` instead."""
        if hidden is None:
            yield
            return
        with ExitStack() as stack:
            for path in self.blocks[:start]:
                block = self.model.get_submodule(path)
                stack.callback(block.__dict__.pop, "forward")
                block.forward = self._pass_on
            first = self.model.get_submodule(self.blocks[start])
            stack.callback(first.register_forward_pre_hook(lambda _, args: (hidden, *args[1:])).remove)
            yield


class _Sums:
    """Streaming sums of a statistics pass."""

    def __init__(self, probe: SensitivityProbe, factors: Mapping[str, Tensor]) -> None:
        self.probe, self.factors = probe, factors
        self.tokens: Tensor | None = None
        self.count = 0  # tokens
        self.fisher: dict[str, Tensor] = {}
        self.observers: dict[str, HistogramObserver] = {}
        self.evened: dict[str, HistogramObserver] = {}
        self.leader = {weight: self._leader(weight) for weight in probe.weights}

    def _leader(self, weight: str) -> str:
        """The first of the layers that read what this one reads, as key and value read what query does: its statistics
        serve them all."""
        family = self.probe.family
        return family.readers(family.block_of(weight), family.linear(weight).reads)[0]

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for weight in self.probe.weights:
                layer = self.probe.layer(weight)
                stack.callback(layer.register_full_backward_hook(self._backward(weight)).remove)
                if self.leader[weight] == weight:
                    stack.callback(layer.register_forward_pre_hook(self._forward(weight)).remove)
            yield

    def _forward(self, weight: str) -> Callable[..., None]:
        observer, factors = HistogramObserver(weight), self.factors.get(weight)
        self.observers[weight] = observer
        if factors is not None:
            self.evened[weight] = HistogramObserver(weight)

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()[self.tokens].float()  # (tokens, in)
            observer.observe(x)
            if factors is not None:
                self.evened[weight].observe(x / factors)

        return hook

    def _backward(self, weight: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, grads: tuple[Tensor, ...]) -> None:
            g = grads[0].detach()[self.tokens].float()  # (tokens, out)
            self.fisher[weight] = g.square().sum(dim=0) + self.fisher.get(weight, torch.zeros((), device=g.device))

        return hook

    def statistics(self, percentile: float | None) -> dict[str, Statistics]:
        if not self.count:
            raise DataError("the calibration set is empty; give at least one sample that is not padding")
        silent = [weight for weight in self.leader if weight not in self.fisher]
        if silent:
            raise DataError(
                f"{silent[0]} never runs when the model reads text, so a search can measure nothing of it; compress "
                f"the model without one, and with --keep-dense '{silent[0]}'"
            )
        scales = {one: observer.scale(ACTIVATION_QMAX, percentile) for one, observer in self.observers.items()}
        evened = {
            one: EvenedInput(self.factors[one], observer.scale(ACTIVATION_QMAX, percentile))
            for one, observer in self.evened.items()
        }
        return {
            weight: Statistics(self.fisher[weight] / self.count, scales[leader], evened.get(leader))
            for weight, leader in self.leader.items()
        }


def _quantized(x: Tensor, scale: float | Tensor) -> Tensor:
    """In float32, as training quantizes: bfloat16 would round the quotient to other integers."""
    return torch.round(x.float() / scale).clamp_(ACTIVATION_QMIN, ACTIVATION_QMAX) * scale
