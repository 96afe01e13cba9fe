"""The reference: a compressed checkpoint run by PyTorch, with its scales applied from the files alone.

It shares nothing with the training code. Activation quantizers are hooks with the saved scales, weights are the baked
ones, and attention is written out here. So a mistake in training, baking or export shows as a difference instead of
repeating itself.

Two arithmetics: float32 with `torch.fake_quantize_per_tensor_affine` (which multiplies by 1/scale, so that some values
fall to another side than under ONNX's division), and, with `exact`, float64 with the division as ONNX writes it. Their
difference is what rounding alone does to this network, and `engines.parity.compare` measures engines by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Closing, require_feeds, require_within
from nxm_export.contract.checkpoint import PLAN_FILE, Checkpoint, open_checkpoint, read_config
from nxm_export.contract.families import family_of
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.plan import CompressionPlan
from nxm_export.contract.tasks import task_named
from nxm_export.errors import EngineError, EngineUnavailable
from nxm_export.hf.model_loading import load_task_model

NAME = "torch_eager"
EMBEDDINGS = "embeddings"  # the boundary in front of the first block


def load(
    checkpoint: str | Path,
    *,
    task: str,
    plan: CompressionPlan | None = None,
    scale_dtype: str = "float32",
    exact: bool = False,
    jitter: float = 0.0,
    everywhere: bool = False,
    nudge: bool = False,
) -> TorchEngine:
    """Load a checkpoint directory, compressed or dense, as an engine.

    `plan` is the plan as exported (an export may drop output quantizers), by default the checkpoint's; scales are rounded
    to `scale_dtype` as the exporter rounds them to the graph's dtype. `exact` computes in float64. `jitter` perturbs what
    every linear layer reads by a random relative error of that size, as a shorter float type would, and with `everywhere`
    also what every module of the model reads and writes: a block by itself rounds there, too. `nudge` moves one
    random code of every sample's first token by one step in every quantized tensor: the least that a quantizer can err.
    Raises `ArtifactError` for a checkpoint that is damaged or breaks its plan, and `ExportError` for one whose head is not
    that of `task`.
    """
    return TorchEngine(
        Path(checkpoint),
        task,
        plan,
        scale_dtype=scale_dtype,
        exact=exact,
        jitter=jitter,
        everywhere=everywhere,
        nudge=nudge,
    )


class TorchEngine(Closing):
    """A checkpoint on the CPU. See `engines.base.Engine`."""

    def __init__(
        self,
        path: Path,
        task: str,
        plan: CompressionPlan | None,
        *,
        scale_dtype: str,
        exact: bool,
        jitter: float,
        everywhere: bool,
        nudge: bool,
    ) -> None:
        try:
            import torch
            import transformers  # noqa: F401  (asked for here, used below)
        except ImportError as error:
            raise EngineUnavailable(
                "the PyTorch reference needs torch and transformers; pip install 'nxm-export[train]'"
            ) from error
        kind, config = task_named(task), read_config(path)
        family = family_of(config, source=str(path))
        self._torch, self._exact, self._nudge = torch, exact, nudge
        self._noise = torch.Generator().manual_seed(0)
        self._model: Any = load_task_model(path, kind)
        self._spec = IOSpec.of(path, config, family, kind)
        self.inputs, self.outputs = self._spec.inputs, tuple(self._spec.outputs)
        self._runs = tuple(family.runs(config))
        self.blocks = tuple(family.run_names(config))
        if jitter:
            self._perturb(jitter, family.weights(config), everywhere)
        if exact:
            self._model.double()
        if (path / PLAN_FILE).is_file():
            checkpoint = open_checkpoint(path)
            checkpoint.require_valid()
            self._quantize(checkpoint, plan or checkpoint.plan, scale_dtype)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        if self._model is None:
            raise EngineError("this reference was closed")
        require_feeds(self, feeds)
        require_within(self._spec, feeds)
        with self._torch.inference_mode():
            outputs = self._model(**{name: self._torch.from_numpy(array) for name, array in feeds.items()})
        return {name: outputs[name].float().numpy().copy() for name in self.outputs}

    def run_blocks(
        self, feeds: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(outputs, what crosses every block boundary) by name; boundaries are `EMBEDDINGS` and then `blocks` (a shared
        block once for every run), float32 (batch, sequence, features), as they are before the next block's quantizer.

        With `given`, such values of another backend, every block reads those instead of what the block before it wrote,
        and so does the head: each then errs by itself alone.
        """
        if self._model is None:
            raise EngineError("this reference was closed")
        found: dict[str, np.ndarray] = {}

        def passed(name: str, value: Any) -> Any:
            """Keep what crosses a boundary; returns what goes on from there."""
            found[name] = value.float().numpy().copy()
            return value if given is None else self._torch.from_numpy(given[name]).to(value.dtype)

        def before(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return None if found else (passed(EMBEDDINGS, args[0]), *args[1:])  # the first of its runs only

        names = iter(self.blocks)  # a block that is shared runs under several of them

        def behind(_: Any, args: Any, output: Any) -> Any:
            return passed(next(names), output)

        handles = [self._model.get_submodule(self._runs[0]).register_forward_pre_hook(before, prepend=True)]
        for path in dict.fromkeys(self._runs):
            handles.append(self._model.get_submodule(path).register_forward_hook(behind))
        try:
            return self.run(feeds), found
        finally:
            for handle in handles:
                handle.remove()

    def close(self) -> None:
        """Drop the model."""
        self._model = None

    def _perturb(self, size: float, weights: Iterable[str], everywhere: bool) -> None:
        torch, noise = self._torch, self._noise

        def moved(value: Any) -> Any:
            if not value.is_floating_point():
                return value  # token ids
            return value * (1 + size * (2 * torch.rand(value.shape, generator=noise) - 1))

        # Registered before the quantizers, so what they round is what is perturbed.
        linears = [self._model.get_submodule(name.removesuffix(".weight")) for name in weights]
        leaves = [module for module in self._model.modules() if not list(module.children())]
        for module in leaves if everywhere else linears:
            module.register_forward_pre_hook(lambda _, args: (moved(args[0]), *args[1:]))
            if everywhere:
                module.register_forward_hook(lambda _, args, output: moved(output))

    def _quantize(self, checkpoint: Checkpoint, plan: CompressionPlan, scale_dtype: str) -> None:
        torch = self._torch
        dtype = getattr(torch, scale_dtype)

        def rounded(scale: Any) -> Any:
            return torch.as_tensor(scale, dtype=torch.float32).to(dtype).float()

        for name, spec in plan.weights.items():
            linear = self._model.get_submodule(name.removesuffix(".weight"))
            if spec.weight_bits and (self._exact or dtype != torch.float32):
                codes = torch.from_numpy(checkpoint.codes(name)).to(linear.weight.dtype)
                linear.weight.data = codes * rounded(checkpoint.weight_scale(name)).to(codes.dtype)[:, None]
            if spec.input_bits:
                scale = float(rounded(checkpoint.input_scale(name)))
                linear.register_forward_pre_hook(
                    lambda _, args, scale=scale: (self._fake_quantize(args[0], scale), *args[1:])
                )
            if spec.output_bits:
                scale = float(rounded(checkpoint.output_scale(name)))
                linear.register_forward_hook(lambda _, args, output, scale=scale: self._fake_quantize(output, scale))
        if plan.residual == "int8":
            self._quantize_residuals(
                checkpoint, plan, lambda x, name: self._fake_quantize(x, float(rounded(checkpoint.input_scale(name))))
            )
        if plan.attention == "int8":
            self._quantize_attention(float(rounded(1.0 / 127.0)))

    def _quantize_residuals(self, checkpoint: Checkpoint, plan: CompressionPlan, fake_quantize: Any) -> None:
        """Everything that reads a block's or an FFN's quantized input reads the quantized value."""
        family = checkpoint.family
        for block in family.blocks(checkpoint.config):
            readers = [f"{family.linear(block, role)}.weight" for role in ("query", "key", "value")]
            quantized = [name for name in readers if plan.weights[name].input_bits]
            if quantized:
                self._model.get_submodule(block).register_forward_pre_hook(
                    lambda _, args, name=quantized[0]: (fake_quantize(args[0], name), *args[1:])
                )
            wide = f"{family.linear(block, 'ffn_up')}.weight"
            if plan.weights[wide].input_bits:
                self._model.get_submodule(f"{block}.{family.attention_norm}").register_forward_hook(
                    lambda _, args, output, name=wide: fake_quantize(output, name)
                )

    def _fake_quantize(self, x: Any, scale: float) -> Any:
        torch = self._torch
        if self._exact:
            y = torch.round(x / scale).clamp(-128, 127) * scale  # half to even, as ONNX rounds
        else:
            y = torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)
        if self._nudge and y.dim() == 3:  # (batch, sequence, features)
            channel = torch.randint(y.shape[-1], (len(y), 1), generator=self._noise)
            y[:, 0].scatter_add_(1, channel, torch.full((len(y), 1), scale, dtype=y.dtype))
        return y

    def _quantize_attention(self, scale: float) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        def attention(
            module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **_: Any
        ) -> Any:
            scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            if attention_mask is not None:
                scores = scores + attention_mask
            probabilities = self._fake_quantize(scores.softmax(-1), scale)
            return (probabilities @ value).transpose(1, 2).contiguous(), probabilities

        AttentionInterface.register("nxm_reference_int8", attention)
        AttentionMaskInterface.register("nxm_reference_int8", eager_mask)
        self._model.set_attn_implementation("nxm_reference_int8")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Loading a model is no progress worth a bar: this happens twice per comparison."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
