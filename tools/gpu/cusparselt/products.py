"""INT8 products through torch, dense (`_int_mm`) and 2:4 (`_cslt_sparse_mm`): which forms run, and which are right.

What torch 2.11 with cuSPARSELt 0.8.0 documents or does: INT8 in gives INT8, INT32, FP16 or BF16 out; `alpha` is a
float32 for every output channel; the bias has the type of the output, but float32 with INT8 output, and nothing checks
it; `out_dtype` must be left out for INT8; the dense operand must be transposed; sizes are multiples of 16 and at least
32; `_int_mm` wants M > 16, and K and N in multiples of 8. A plan is made at every call, which CUDA graphs hide.

Shapes: activations (M, K), weights (N, K), results (M, N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from tools.gpu.cusparselt.timing import ContextLost, Problem

OUTPUTS = {"int32": torch.int32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
Algorithm = dict[str, int]


@dataclass(frozen=True)
class Form:
    """One way to ask for a product: the output's type, who transposes it, and what the epilogue does."""

    output: str
    transposed: bool
    scaled: bool
    bias: str | None = None

    def __str__(self) -> str:
        parts = [self.output, "(M, N)" if self.transposed else "(N, M)"]
        return " ".join(parts + ["alpha"] * self.scaled + ([f"bias {self.bias}"] if self.bias else []))


@dataclass
class Choice:
    """What `Products.try_forms` found best for an output type; `bias` is the type that a bias must have, None for no
    bias."""

    transposed: bool = True
    bias: str | None = None


@dataclass
class Products:
    """The operations on a GPU, or with CPU stand-ins in a rehearsal."""

    device: str
    problems: list[Problem]
    choices: dict[str, Choice] = field(default_factory=lambda: {output: Choice() for output in OUTPUTS})

    @property
    def rehearsed(self) -> bool:
        return self.device == "cpu"

    @property
    def signature(self) -> str:
        """Of the sparse product, in this torch."""
        return str(torch.ops.aten._cslt_sparse_mm.default._schema)

    def compress(self, weight: Tensor) -> Tensor:
        """A 2:4 weight in cuSPARSELt's storage."""
        return weight if self.rehearsed else torch._cslt_compress(weight)

    def int_mm(self, x: Tensor, weight: Tensor) -> Tensor:
        """(M, K) INT8 times (N, K) INT8, exact int32."""
        return torch._int_mm(x, weight.t())

    def sparse(
        self,
        weight: Tensor,
        x: Tensor,
        output: str,
        alpha: Tensor | None = None,
        bias: Tensor | None = None,
        algorithm: Algorithm | None = None,
    ) -> Tensor:
        """The product with a compressed weight; cuSPARSELt computes weight @ x.T."""
        if self.rehearsed:
            return _stand_in(weight, x, OUTPUTS[output], alpha, bias)
        transposed = self.choices[output].transposed
        y = torch._cslt_sparse_mm(
            weight,
            x.t(),
            bias=bias,
            alpha=alpha,
            out_dtype=self._asked(x, output),
            transpose_result=transposed,
            **(algorithm or {}),
        )
        return y if transposed else y.t()

    def search(
        self, weight: Tensor, x: Tensor, output: str, alpha: Tensor | None = None, bias: Tensor | None = None
    ) -> Algorithm:
        """The fastest algorithm for these shapes, as arguments of `sparse`; empty where none can be used."""
        if self.rehearsed:
            return {}
        arguments = (weight, x.t(), bias, alpha, self._asked(x, output), self.choices[output].transposed)
        numbers: tuple[int, ...] = ()
        for searcher in self._searchers():
            try:
                numbers = searcher(*arguments)
                break
            except Exception as error:
                self.problems.append(Problem.of(f"search for {output}", error))
        for candidate in self._candidates(numbers):
            try:
                self.sparse(weight, x, output, alpha, bias, candidate)
                torch.cuda.synchronize()
                return candidate
            except Exception as error:
                self.problems.append(Problem.of(f"algorithm {candidate} for {output}", error))
        return {}

    def vector(self, values: Tensor, dtype: str) -> Tensor:
        """`values` in a type, with as much behind them: a kernel that reads them as a wider type stays inside."""
        room = torch.zeros(4 * values.numel(), device=values.device, dtype=_dtype(dtype))
        room[: values.numel()] = values.to(room.dtype)
        return room[: values.numel()]

    def try_forms(self, m: int = 256, n: int = 512, k: int = 1024) -> dict[str, float | str]:
        """Small products in every form: the relative error of each, or its error text; decides on `choices`."""
        outcome: dict[str, float | str] = {}
        example = Example.random(self, m, n, k, 1)
        compressed = self.compress(example.weights[0])
        right: set[Form] = set()
        for form in _forms():
            unit = INT8_UNIT(k) if form.output == "int8" else 1.0
            alpha = example.alpha * unit if form.scaled else None
            raw = example.bias * (10 if form.output == "int8" else 1) if form.bias else None
            bias = self.vector(raw, form.bias) if raw is not None and form.bias else None
            self.choices[form.output].transposed = form.transposed
            try:
                y = self.sparse(compressed, example.xs[0], form.output, alpha, bias)
                deviation = relative_error(y, example.exact, alpha, raw)
                outcome[str(form)] = round(deviation, 5)
                if deviation < 0.02:
                    right.add(form)
            except ContextLost:
                raise
            except Exception as error:
                outcome[str(form)] = Problem.of(str(form), error).error
        for output, choice in self.choices.items():
            mine = [form for form in right if form.output == output]
            choice.transposed = sum(form.transposed for form in mine) >= len(mine) / 2
            biases = {form.bias for form in mine if form.transposed == choice.transposed and form.bias}
            documented = "float32" if output == "int8" else output
            choice.bias = next((name for name in (documented, "float32", output) if name in biases), None)
        return outcome

    def _searchers(self) -> Iterator[Callable[..., tuple[int, ...]]]:
        library = getattr(torch._C, "_cusparselt", None)
        if library is not None:
            yield lambda *arguments: tuple(int(number) for number in library.mm_search(*arguments))
        yield lambda *arguments: (int(torch._cslt_sparse_mm_search(*arguments)),)

    def _candidates(self, numbers: tuple[int, ...]) -> list[Algorithm]:
        """From what a search says: (algorithm, split of K, its mode, number of algorithms), or the algorithm alone."""
        if not numbers:
            return []
        candidates: list[Algorithm] = [{"alg_id": numbers[0]}, {}]
        if len(numbers) >= 3 and numbers[1] != 1:
            mode = "split_k_mode" if "split_k_mode" in self.signature else "split_k_one_kernel"
            candidates.insert(0, {"alg_id": numbers[0], "split_k": numbers[1], mode: numbers[2]})
        return candidates

    def _asked(self, x: Tensor, output: str) -> torch.dtype | None:
        return None if OUTPUTS[output] == x.dtype else OUTPUTS[output]


@dataclass(frozen=True)
class Example:
    """Random operands of a product, 2:4 weights, and the exact int32 result of the first pair."""

    xs: list[Tensor]
    weights: list[Tensor]
    alpha: Tensor
    bias: Tensor
    exact: Tensor

    @classmethod
    def random(cls, products: Products, m: int, n: int, k: int, copies: int) -> Example:
        """Of these sizes; the weight is the same in every copy."""
        device, generator = products.device, torch.Generator(device=products.device).manual_seed(0)

        def integers(rows: int) -> Tensor:
            return torch.randint(-127, 128, (rows, k), device=device, dtype=torch.int8, generator=generator)

        xs = [integers(m) for _ in range(copies)]
        weight = pruned(integers(n))
        weights = [weight, *(weight.clone() for _ in range(copies - 1))]
        alpha = (torch.rand(n, device=device, generator=generator) + 0.5) * 1e-4
        bias = torch.randn(n, device=device, generator=generator)
        return cls(xs, weights, alpha, bias, products.int_mm(xs[0], weight))


def pruned(weight: Tensor) -> Tensor:
    """Two of every four along K set to 0, the smaller ones."""
    groups = weight.abs().float().reshape(weight.shape[0], -1, 4)  # (N, groups, 4)
    largest = groups.topk(2, dim=-1).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, largest, True)
    return (weight * mask.reshape(weight.shape)).contiguous()


def INT8_UNIT(k: int) -> float:  # noqa: N802  (a constant of K)
    """What brings `Example.alpha` to results of about 40 steps of INT8: few are clipped."""
    return 40 / (math.sqrt(k / 2) * 6200 * 1e-4)


def relative_error(y: Tensor, exact: Tensor, alpha: Tensor | None, bias: Tensor | None) -> float:
    """Of a result, against the int32 one with scale and bias in float64; INT8 against what is rounded and clipped."""
    reference = exact.double()
    if alpha is not None:
        reference = reference * alpha.double()
    if bias is not None:
        reference = reference + bias.double()
    if y.dtype is torch.int8:
        reference = reference.round().clamp(-128, 127)
    return float((y.double() - reference).norm() / reference.norm())


def _forms() -> Iterator[Form]:
    for output in OUTPUTS:
        for transposed in (True, False):
            if output in ("int32", "int8"):
                yield Form(output, transposed, scaled=False)
            if output != "int32":
                yield Form(output, transposed, scaled=True)
                yield Form(output, transposed, scaled=True, bias="float32")
            if output in ("float16", "bfloat16"):
                yield Form(output, transposed, scaled=True, bias=output)


def _stand_in(weight: Tensor, x: Tensor, dtype: torch.dtype, alpha: Tensor | None, bias: Tensor | None) -> Tensor:
    exact = torch._int_mm(x, weight.t())
    if dtype is torch.int32:
        return exact
    y = exact.float() * (1.0 if alpha is None else alpha) + (0.0 if bias is None else bias.float())
    return y.round().clamp(-128, 127).to(torch.int8) if dtype is torch.int8 else y.to(dtype)


def _dtype(name: str) -> torch.dtype:
    return cast(torch.dtype, getattr(torch, name))
