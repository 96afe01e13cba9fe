"""The reference: a compressed checkpoint run by PyTorch, with its scales applied from the files alone.

It shares nothing with the training code. Activation quantizers are hooks with the saved scales, weights are the baked
ones, and attention is written out (`engines.reference.attention`). So a mistake in training, baking or export shows as
a difference instead of repeating itself.

Two arithmetics: float32 with `torch.fake_quantize_per_tensor_affine` (which multiplies by 1/scale, so that some values
fall to another side than under ONNX's division), and, with `exact`, float64 with the division as ONNX writes it. Their
difference is what rounding alone does to this network, and `engines.parity.compare` measures engines by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.base import Closing, require_feeds, require_within
from engines.reference.attention import PROBABILITIES, change_operands, use_blocked_attention
from nxm_export.contract.checkpoint import PLAN_FILE, Checkpoint, open_checkpoint, read_config
from nxm_export.contract.encoder_family import BLOCK, FFN
from nxm_export.contract.families import family_of
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.plan import CompressionPlan
from nxm_export.contract.tasks import task_named
from nxm_export.errors import EngineError, EngineUnavailable
from nxm_export.hf.finite_masks import read_rows_of_padding
from nxm_export.hf.model_loading import load_task_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Change = Callable[[Tensor], Tensor]

EMBEDDINGS = "embeddings"  # the boundary in front of the first block


@dataclass(frozen=True)
class Perturbation:
    """Errors that a correct engine may make, made on purpose. Their effect is what an engine is allowed to differ by.

    `rounding_noise` is the size of a random relative error on what every linear layer reads, as a shorter float type
    would make it, and with `everywhere` also on what every module of the model reads and writes: a block by itself
    rounds there, too. `one_step_shift` moves one random code of every sample's first token by one step in every
    quantized tensor: the least that a quantizer can err.
    """

    rounding_noise: float = 0.0
    everywhere: bool = False
    one_step_shift: bool = False


def load(
    checkpoint: str | Path,
    *,
    task: str,
    plan: CompressionPlan | None = None,
    scale_dtype: str = "float32",
    exact: bool = False,
    perturbation: Perturbation = Perturbation(),
) -> TorchEngine:
    """Load a checkpoint directory, compressed or dense, as an engine.

    `plan` is the plan as exported (an export may drop output quantizers), by default the checkpoint's; scales are
    rounded to `scale_dtype` as the exporter rounds them to the graph's dtype. `exact` computes in float64. Raises
    `ArtifactError` for a checkpoint that is damaged or breaks its plan, and `ExportError` for one whose head is not
    that of `task`.
    """
    engine = TorchEngine(Path(checkpoint), task, exact=exact, perturbation=perturbation)
    if (Path(checkpoint) / PLAN_FILE).is_file():
        opened = open_checkpoint(Path(checkpoint))
        opened.require_valid()
        engine.quantize(opened, plan or opened.plan, scale_dtype)
    return engine


class TorchEngine(Closing):
    """A checkpoint on the CPU (see `engines.base.Engine`), weights as they are stored; `quantize` adds the scales."""

    def __init__(self, path: Path, task: str, *, exact: bool, perturbation: Perturbation) -> None:
        try:
            import torch
            import transformers  # noqa: F401  (asked for here, used below)
        except ModuleNotFoundError as error:
            raise EngineUnavailable(
                "the PyTorch reference needs torch and transformers; pip install 'nxm-export[train]'"
            ) from error
        except ImportError as error:  # a library that it needs, or memory to map its own
            raise EngineUnavailable(f"torch or transformers is installed and cannot be loaded ({error})") from error
        kind, config = task_named(task), read_config(path)
        family = family_of(config, source=str(path))
        self._exact, self._shifts = exact, perturbation.one_step_shift
        self._noise = torch.Generator().manual_seed(0)
        model: nn.Module = load_task_model(path, kind)
        self._model: nn.Module | None = model
        self._spec = IOSpec.of(path, config, family, kind)
        self.inputs, self.outputs = self._spec.inputs, tuple(self._spec.outputs)
        self._runs = tuple(family.runs(config))
        self.blocks = tuple(family.run_names(config))
        if perturbation.rounding_noise:
            _perturb(model, family.weights(config), perturbation, self._noise)
        if exact:
            model.double()
        if family.attention.interface:
            use_blocked_attention(model)
        read_rows_of_padding(model)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        import torch

        model = self._opened()
        require_feeds(self, feeds)
        require_within(self._spec, feeds)
        with torch.inference_mode():
            outputs = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        return {name: outputs[name].float().numpy().copy() for name in self.outputs}

    def run_blocks(
        self, feeds: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(outputs, what crosses every block boundary) by name; boundaries are `EMBEDDINGS` and then `blocks` (a shared
        block once for every run), float32 (batch, sequence, features), as they are before the next block's quantizer.

        With `given`, such values of another backend, every block reads those instead of what the block before it wrote,
        and so does the head: each then errs by itself alone.
        """
        import torch

        model = self._opened()
        crossings: dict[str, np.ndarray] = {}

        def passed(name: str, value: Tensor) -> Tensor:
            """Keep what crosses a boundary; returns what goes on from there."""
            crossings[name] = value.float().numpy().copy()
            return value if given is None else torch.from_numpy(given[name]).to(value.dtype)

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            return None if crossings else (passed(EMBEDDINGS, args[0]), *args[1:])  # the first of its runs only

        names = iter(self.blocks)  # a block that is shared runs under several of them

        def behind(_: nn.Module, __: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> object:
            name = next(names)
            return (passed(name, output[0]), *output[1:]) if isinstance(output, tuple) else passed(name, output)

        handles = [model.get_submodule(self._runs[0]).register_forward_pre_hook(before, prepend=True)]
        for path in dict.fromkeys(self._runs):
            handles.append(model.get_submodule(path).register_forward_hook(behind))
        try:
            return self.run(feeds), crossings
        finally:
            for handle in handles:
                handle.remove()

    def close(self) -> None:
        """Drop the model."""
        self._model = None

    def quantize(self, checkpoint: Checkpoint, plan: CompressionPlan, scale_dtype: str) -> None:
        """Apply a checkpoint's scales as `plan` says: hooks for activations, and weights of rounded scales."""
        import torch

        model, dtype = self._opened(), getattr(torch, scale_dtype)

        def rounded(scale: np.ndarray | float) -> Tensor:
            return torch.as_tensor(scale, dtype=torch.float32).to(dtype).float()

        for name, spec in plan.weights.items():
            linear = model.get_submodule(name.removesuffix(".weight"))
            factors = checkpoint.input_factors(name) if spec.input_bits else None
            divisor = None if factors is None else torch.from_numpy(factors)
            if spec.weight_bits and (self._exact or dtype != torch.float32):
                weight = linear.get_parameter("weight")
                codes = torch.from_numpy(checkpoint.codes(name)).to(weight.dtype)
                weight.data = codes * rounded(checkpoint.weight_scale(name)).to(codes.dtype)[:, None]
                if divisor is not None:
                    weight.data = weight.data / divisor.to(codes.dtype)
            if spec.input_bits:
                quantizer = self._fake_quantizer(float(rounded(checkpoint.input_scale(name))))
                _before(linear, quantizer if divisor is None else _evened_out(quantizer, divisor))
            if spec.output_bits:
                scales = [checkpoint.output_scale(part) for part in checkpoint.family.parts(name)]
                _behind(linear, self._part_quantizer([float(rounded(scale)) for scale in scales]))
        if plan.residual == "int8":
            self._quantize_residuals(
                checkpoint, plan, lambda name: self._fake_quantizer(float(rounded(checkpoint.input_scale(name))))
            )
        if plan.attention == "int8":
            kind = checkpoint.family.attention
            for block in checkpoint.family.blocks(checkpoint.config):
                changes = {
                    operand: self._fake_quantizer(float(rounded(scale)))
                    for operand, scale in {**checkpoint.operand_scales(block), PROBABILITIES: 1.0 / 127.0}.items()
                }
                attention = model.get_submodule(f"{block}.{kind.path}")
                if kind.dropout:
                    _before(attention.get_submodule(kind.dropout), changes[PROBABILITIES])
                else:
                    change_operands(attention, changes)

    def _opened(self) -> nn.Module:
        if self._model is None:
            raise EngineError("this reference was closed")
        return self._model

    def _quantize_residuals(
        self, checkpoint: Checkpoint, plan: CompressionPlan, quantizer: Callable[[str], Change]
    ) -> None:
        """Everything that reads a block's or an FFN's quantized input reads the quantized value."""
        model, family = self._opened(), checkpoint.family
        for block in family.blocks(checkpoint.config):
            first, wide = (
                [name for name in family.readers(block, tensor) if plan.weights[name].input_bits]
                for tensor in (BLOCK, FFN)
            )
            if first:
                _before(model.get_submodule(block), quantizer(first[0]))
            if wide:
                _behind(model.get_submodule(f"{block}.{family.ffn_norm}"), quantizer(wide[0]))

    def _fake_quantizer(self, scale: float) -> Change:
        return lambda x: self._fake_quantize(x, scale)

    def _part_quantizer(self, scales: Sequence[float]) -> Change:
        """Quantizes as many parts of the last axis, side by side and of one size, as there are scales."""
        import torch

        def change(x: Tensor) -> Tensor:
            parts = x.chunk(len(scales), dim=-1)
            return torch.cat([self._fake_quantize(part, s) for part, s in zip(parts, scales, strict=True)], dim=-1)

        return change if len(scales) > 1 else self._fake_quantizer(scales[0])

    def _fake_quantize(self, x: Tensor, scale: float) -> Tensor:
        import torch

        if self._exact:
            y = torch.round(x / scale).clamp(-128, 127) * scale  # half to even, as ONNX rounds
        else:
            y = torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)
        if self._shifts and y.dim() == 3:  # (batch, sequence, features)
            channel = torch.randint(y.shape[-1], (len(y), 1), generator=self._noise)
            y[:, 0].scatter_add_(1, channel, torch.full((len(y), 1), scale, dtype=y.dtype))
        return y


def _evened_out(change: Change, factors: Tensor) -> Change:
    """`change` of what is divided by the factors (in,) of its channels, multiplied by them again."""

    def changed(x: Tensor) -> Tensor:
        divisor = factors.to(x.dtype)
        return change(x / divisor) * divisor

    return changed


def _before(module: nn.Module, change: Change) -> None:
    """Let `change` make what a module reads first."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(args[0]), *args[1:])

    module.register_forward_pre_hook(hook)


def _behind(module: nn.Module, change: Change) -> None:
    """Let `change` make what a module writes: a tensor, or several, as the cosines and sines of rotary positions."""

    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return tuple(map(change, output)) if isinstance(output, tuple) else change(output)

    module.register_forward_hook(hook)


def _perturb(model: nn.Module, weights: Iterable[str], perturbation: Perturbation, noise: torch.Generator) -> None:
    """Register rounding noise; before the quantizers are, so that what they round is what is perturbed."""
    import torch

    def moved(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value  # token ids
        return value * (1 + perturbation.rounding_noise * (2 * torch.rand(value.shape, generator=noise) - 1))

    linears = [model.get_submodule(name.removesuffix(".weight")) for name in weights]
    leaves = [module for module in model.modules() if not list(module.children())]
    for module in leaves if perturbation.everywhere else linears:
        _before(module, moved)
        if perturbation.everywhere:
            _behind(module, moved)
