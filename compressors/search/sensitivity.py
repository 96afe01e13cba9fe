"""How much each (weight, option) hurts on its own: the table that the search decides from.

Two measures, both with the weight compressed as the recipe would make it before training
(`compressors.pruning.layerwise.DRAFTS`) and its input quantized, everything else dense:

``kl``      divergence of the model's outputs from the dense model's on calibration samples;
``fisher``  ``sum_o f_o (w_o - z_o)^T E[x x^T] (w_o - z_o)`` with f_o the mean squared gradient of the loss at output o:
            the second-order estimate of the loss, without a forward pass per entry.

Memory does not depend on the number of samples, and holds the second moments of one block, or of several that together
take no more than `MOMENTS_IN_MEMORY`: statistics are streamed, and for each encoder block the samples pass in chunks
through the blocks before it twice, and through the rest once per entry. Finished blocks are kept on disk, so an
interrupted table goes on where it was. Under ``torchrun`` each process measures some of the blocks.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compressors import distributed
from compressors.pruning.layer_inputs import by_block, second_moments
from compressors.pruning.layerwise import OutputMetric, Solution, Solver, metrics
from compressors.quantization.autograd import ACTIVATION_QMAX, ACTIVATION_QMIN
from compressors.quantization.observers import HistogramObserver
from compressors.training.output_divergence import divergence, real_logits
from nxm_export.contract.encoder_family import Family
from nxm_export.contract.plan import WeightSpec
from nxm_export.errors import ArtifactError, DataError
from nxm_export.hf.protocols import TaskOutput
from nxm_export.storage.atomic import make_directory, write_atomic

Batches = Sequence[Mapping[str, Tensor]]
COLUMNS = ("weight", "option", "kl", "fisher")
MOMENTS_IN_MEMORY = 2**28  # bytes, at most: layers that read one tensor share its moments
_LEAST = -1e-9  # no divergence is negative but by rounding
Options = Mapping[str, Sequence[WeightSpec]]  # what to measure, by weight


@dataclass(frozen=True)
class Sensitivity:
    """One row of the table."""

    weight: str
    option: str
    kl: float
    fisher: float


@dataclass
class Statistics:
    """What one pass over the calibration samples tells about a weight's layer.

    `fisher` is the mean squared gradient of a sample's loss per output channel (out,), the sum over the runs of a layer
    that runs several times for one token (shared layers); `input_scale` the static INT8 scale of what it reads.
    """

    fisher: Tensor
    input_scale: float


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

    def statistics(self, batches: Batches, percentile: float) -> dict[str, Statistics]:
        """Stream the calibration samples (with labels) through the dense model once, forward and backward.

        Raises `DataError` for a model that is broken already: it names the weight that is, or that reads what is no
        number.
        """
        for weight in self.weights:
            if not bool(torch.isfinite(self.layer(weight).weight).all()):
                raise DataError(f"{weight} holds NaN or infinite values; the model is broken before compression")
        sums, directions = _Sums(self), torch.Generator().manual_seed(0)
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

    @staticmethod
    def _loss(output: TaskOutput, directions: torch.Generator) -> Tensor:
        """The task's loss, a mean over samples. Embeddings have none; the mean squared gradient of a random direction's
        length then stands for how far all of the vector moves."""
        if output.loss is not None:
            return output.loss
        direction = torch.randn(output.logits.shape, generator=directions).to(output.logits.device)
        return (output.logits * direction).sum(-1).mean()

    @contextmanager
    def installed(self, weights: Mapping[str, tuple[Tensor, float | None]]) -> Iterator[None]:
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


@dataclass(frozen=True)
class Candidate:
    """A weight under an option, in as few bytes as it needs: `values` (out, in) are codes of `scale` (out, 1), or the
    weight itself where that is None. `errors` (out,) is the mean squared error of every output."""

    values: Tensor
    scale: Tensor | None
    errors: Tensor

    @property
    def weight(self) -> Tensor:
        """(out, in) float32."""
        return self.values.float() if self.scale is None else self.values.float() * self.scale


class OneShot:
    """Every (weight, option) compressed without training, by `solver`, for what the layers of the dense model read on
    `batches`.

    All `options` of a block are made when the first of them is asked for. One pass over the samples gives its second
    moments, and those of blocks behind it that fit into memory, too; they are not kept.
    """

    def __init__(
        self,
        probe: SensitivityProbe,
        statistics: Mapping[str, Statistics],
        batches: Batches,
        options: Options,
        solver: Solver,
    ) -> None:
        self.probe, self.statistics, self.batches, self.solver = probe, statistics, batches, solver
        self.options = {
            weight: {replace(option, output_bits=None) for option in specs} for weight, specs in options.items()
        }
        self._made: dict[tuple[str, WeightSpec], Candidate] = {}
        self._moments: dict[str, Tensor] = {}  # of blocks that the last pass read, too

    def __call__(self, weight: str, option: WeightSpec) -> tuple[Tensor, float | None]:
        """(weight (out, in) float32, input scale or None)."""
        return self.candidate(weight, option).weight, self.statistics[weight].input_scale if option.input_bits else None

    def candidate(self, weight: str, option: WeightSpec) -> Candidate:
        """What became of a weight; `option` is one of its `options`, whatever its output."""
        bare = replace(option, output_bits=None)
        if (weight, bare) not in self._made:
            self._make(self.probe.family.block_of(weight))
        return self._made[weight, bare]

    def share(self) -> None:
        """Give every process what any of them has made; all call this together."""
        for part in distributed.gathered([self._made]):
            self._made = part | self._made

    @torch.no_grad()
    def _make(self, block: str) -> None:
        """Every option of every weight of a block."""
        layers = {weight: self.probe.layer(weight) for weight in self.probe.weights if self.options.get(weight)}
        (inside,) = by_block(layers, [block])
        if not inside.keys() <= self._moments.keys():
            together = by_block(layers, self.probe.blocks[self.probe.blocks.index(block) :])
            self._moments = second_moments(self.probe.model, _fitting(together), self.batches)
        for weight, metric in metrics({weight: self._moments.pop(weight) for weight in inside}):
            dense, options = inside[weight].weight.detach().float(), sorted(self.options[weight], key=str)
            for option, solution in zip(options, self.solver.all(dense, metric, options), strict=True):
                self._made[weight, option] = _candidate(dense, metric, solution)


def _fitting(parts: Sequence[Mapping[str, nn.Linear]]) -> dict[str, nn.Linear]:
    """The layers of the first part, and of those behind it as long as all moments fit into memory."""
    taken, size = dict[str, nn.Linear](), 0
    for part in parts:
        size += sum(4 * layer.in_features**2 for layer in part.values())
        if taken and size > MOMENTS_IN_MEMORY:
            break
        taken |= part
    return taken


def _candidate(dense: Tensor, metric: OutputMetric, solution: Solution) -> Candidate:
    values, scale = solution.weight.half(), None
    if solution.scale is not None:
        values, scale = torch.round(solution.weight / solution.scale).to(torch.int8), solution.scale
    difference = dense - (values.float() if scale is None else values.float() * scale)
    return Candidate(values, scale, ((difference @ metric.raw) * difference).double().sum(dim=1))


class _Sums:
    """Streaming sums of a statistics pass."""

    def __init__(self, probe: SensitivityProbe) -> None:
        self.probe = probe
        self.tokens: Tensor | None = None
        self.count = 0  # tokens
        self.fisher: dict[str, Tensor] = {}
        self.observers: dict[str, HistogramObserver] = {}
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
        observer = self.observers[weight] = HistogramObserver(weight)

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            observer.observe(args[0].detach()[self.tokens].float())  # (tokens, in)

        return hook

    def _backward(self, weight: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, grads: tuple[Tensor, ...]) -> None:
            g = grads[0].detach()[self.tokens].float()  # (tokens, out)
            self.fisher[weight] = g.square().sum(dim=0) + self.fisher.get(weight, torch.zeros((), device=g.device))

        return hook

    def statistics(self, percentile: float) -> dict[str, Statistics]:
        if not self.count:
            raise DataError("the calibration set is empty; give at least one sample that is not padding")
        silent = [weight for weight in self.leader if weight not in self.fisher]
        if silent:
            raise DataError(
                f"{silent[0]} never runs when the model reads text, so a search can measure nothing of it; compress "
                f"the model without one, and with --keep-dense '{silent[0]}'"
            )
        return {
            weight: Statistics(
                self.fisher[weight] / self.count,
                self.observers[leader].scale(ACTIVATION_QMAX, percentile),
            )
            for weight, leader in self.leader.items()
        }


def measure(
    probe: SensitivityProbe,
    batches: Batches,
    one_shot: OneShot,
    options: Options,
    directory: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Sensitivity]:
    """The table of all weights and their options, in that order.

    Every process adds what it measures, block by block, to a file of its own in `directory`, which is to belong to this
    model, these samples and these options; what the files hold already is not measured again.
    """
    if not any(len(batch["input_ids"]) for batch in batches):
        raise DataError("the calibration set is empty")
    earlier = {file: read_sensitivities(file) for file in sorted(directory.glob(_part_name("*")))}
    distributed.wait()  # everyone has read the parts before anyone goes on writing one
    known = {(entry.weight, entry.option): entry for part in earlier.values() for entry in part}
    missing = []
    for block in range(len(probe.blocks)):
        weights = [weight for weight in probe.weights if weight.startswith(f"{probe.blocks[block]}.")]
        if any((weight, str(option)) not in known for weight in weights for option in options[weight]):
            missing.append((block, weights))
    own_file = directory / _part_name(str(distributed.rank()))
    own, new = list(earlier.get(own_file, [])), list[Sensitivity]()
    done = len(probe.blocks) - len(missing)
    for number, (block, weights) in enumerate(missing[distributed.rank() :: distributed.world_size()]):
        new += _measure_block(probe, batches, one_shot, {weight: options[weight] for weight in weights}, block)
        write_sensitivities(own_file, own + new)
        progress(min(done + (number + 1) * distributed.world_size(), len(probe.blocks)), len(probe.blocks))
    one_shot.share()
    known |= {(entry.weight, entry.option): entry for entry in distributed.gathered(new)}
    return [known[weight, str(option)] for weight in probe.weights for option in options[weight]]


def _part_name(rank: str) -> str:
    return f"sensitivity-{rank}.csv"


def _measure_block(
    probe: SensitivityProbe, batches: Batches, one_shot: OneShot, options: Options, block: int
) -> list[Sensitivity]:
    pairs = [(weight, option) for weight, specs in options.items() for option in specs]
    totals = [0.0] * len(pairs)
    start = 0 if probe.repeats else block
    for batch in batches:
        hidden, reference = probe.hidden_before(batch, start) if start else (None, probe.outputs(batch))
        for number, (weight, option) in enumerate(pairs):
            with probe.installed({weight: one_shot(weight, option)}):
                totals[number] += divergence(reference, probe.outputs(batch, start, hidden), probe.output_kind)
    samples = sum(len(batch["input_ids"]) for batch in batches)
    entries = []
    for (weight, option), total in zip(pairs, totals, strict=True):
        fisher = float(one_shot.candidate(weight, option).errors @ one_shot.statistics[weight].fisher.double())
        kl = total / samples
        if not (math.isfinite(kl) and math.isfinite(fisher)):
            raise DataError(
                f"{weight} under {option}: its sensitivity is {kl if not math.isfinite(kl) else fisher}; the "
                "model overflows on "
                "the calibration samples: leave it out of the candidate specs, or check the model"
            )
        entries.append(Sensitivity(weight, str(option), kl, fisher))
    return entries


def write_sensitivities(file: Path, table: Iterable[Sensitivity]) -> None:
    """Write the table as CSV, old or new, never half; raises `ArtifactError` where the disk is full."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([entry.weight, entry.option, repr(entry.kl), repr(entry.fisher)] for entry in table)
    make_directory(file.parent)
    write_atomic(file, text.getvalue())


def read_sensitivities(file: Path) -> list[Sensitivity]:
    """Read a table; raises `ArtifactError` when it is none, torn, or holds what no measurement gives."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            text = stream.read()
        reader = csv.DictReader(text.splitlines())
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"columns {reader.fieldnames}")
        if not text.endswith("\n"):
            raise ValueError("its last line is torn")
        table = [Sensitivity(row["weight"], row["option"], float(row["kl"]), float(row["fisher"])) for row in reader]
        for entry in table:
            if not all(math.isfinite(value) and value > _LEAST for value in (entry.kl, entry.fisher)):
                raise ValueError(f"{entry.weight} under {entry.option}: kl {entry.kl}, fisher {entry.fisher}")
        return table
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{file}: not a sensitivity table ({error}); delete it to measure again") from error


def _quantized(x: Tensor, scale: float) -> Tensor:
    """In float32, as training quantizes: bfloat16 would round the quotient to other integers."""
    return torch.round(x.float() / scale).clamp_(ACTIVATION_QMIN, ACTIVATION_QMAX) * scale
