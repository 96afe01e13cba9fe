"""The INT8 products of an engine: matrices on the device, padded to what kernels take, and the form that each number of
rows runs in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from engines.cusparselt.fusing import Compile, Function, with_own_code
from engines.cusparselt.kernels import DENSE, FORMS, LEAST, MATRIX_STEP, ROWS_STEP, Form, Kernels
from engines.cusparselt.operators import torch_type
from engines.cusparselt.program import Choice, Product, Program

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SizeKey = tuple[int, int, str, bool]  # N, K, output, whether there is a bias


def padded(size: int, step: int) -> int:
    """The next multiple of `step`, and at least `LEAST`."""
    return max(LEAST, -(-size // step) * step)


def sizes_of(product: Product) -> SizeKey:
    """What decides on a product's time beside its rows."""
    return product.n, product.k, product.output, product.bias is not None


class Matrix:
    """One weight on the device: its codes (N, K), and its compressed form where a sparse form is used."""

    def __init__(self, codes: Tensor, kernels: Kernels, *, two_four: bool) -> None:
        from torch.nn import functional

        n, k = codes.shape
        right, below = padded(k, MATRIX_STEP) - k, padded(n, MATRIX_STEP) - n
        self._codes = functional.pad(codes, (0, right, 0, below)).contiguous().to(kernels.device)
        self._kernels = kernels
        self._packed: Tensor | None = None
        self.two_four = two_four

    @property
    def codes(self) -> Tensor:
        """(N, K) with zeros up to multiples of `MATRIX_STEP`."""
        return self._codes

    @property
    def packed(self) -> Tensor:
        """The compressed form, made when it is first asked for."""
        if self._packed is None:
            self._packed = self._kernels.compress(self._codes)
        return self._packed


class Epilogue:
    """Scale, bias and output of one product, in the forms that kernels take."""

    def __init__(
        self, product: Product, tensors: Mapping[str, Tensor], kernels: Kernels, after: Callable[[str], Function]
    ) -> None:
        self._after = after(product.output)
        self.out = torch_type(product.output)
        self.n = product.n
        rows = padded(product.n, MATRIX_STEP)
        self.alpha = _room(tensors[product.alpha], rows, "float32", kernels.device)
        bias = tensors[product.bias] if product.bias else None
        self.bias = None if bias is None else _room(bias, rows, "float32", kernels.device)
        own = product.output if product.output != "int8" else "float32"
        self.typed_bias = None if bias is None else _room(bias, rows, own, kernels.device)

    def after(self, sums: Tensor) -> Tensor:
        """What is left to do with int32 sums."""
        return self._after(sums, self.alpha, *(() if self.bias is None else (self.bias,)))[0]


def _room(values: Tensor, size: int, dtype: str, device: str) -> Tensor:
    """`values` in a type, with zeros up to `size`, and as much memory behind them that a kernel which reads them as a
    wider type stays inside."""
    import torch

    room = torch.zeros(4 * size, dtype=torch_type(dtype), device=device)
    room[: values.numel()] = values.to(room.dtype)
    return room[:size]


def multiply(kernels: Kernels, matrix: Matrix, epilogue: Epilogue, x: Tensor, form: str, algorithm: int) -> Tensor:
    """Codes (M, K) times a matrix in a form, as (M, N); both sizes padded, M a multiple of `ROWS_STEP`."""
    if form == DENSE:
        return epilogue.after(kernels.dense(x, matrix.codes))
    return _sparse(kernels, matrix, epilogue, x, FORMS[form], algorithm)


def sparse_arguments(epilogue: Epilogue, form: Form) -> tuple[torch.dtype, Tensor | None, Tensor | None]:
    """(output type, scale, bias) that a sparse product is given in a form."""
    import torch

    if not form.fused:
        return torch.int32, None, None
    return epilogue.out, epilogue.alpha, epilogue.bias if form.float_bias else epilogue.typed_bias


def _sparse(kernels: Kernels, matrix: Matrix, epilogue: Epilogue, x: Tensor, form: Form, algorithm: int) -> Tensor:
    out, alpha, bias = sparse_arguments(epilogue, form)
    y = kernels.sparse(matrix.packed, x, out, alpha, bias, algorithm, transposed=form.transposed)
    return y if form.fused else epilogue.after(y)


def epilogue_functions(compile_: Compile) -> Callable[[str], Function]:
    """The function of (sums, scale, bias) behind int32 sums, by the type of its output; each is compiled once."""

    @cache
    def after(output: str) -> Function:
        import torch

        out = torch_type(output)

        def scaled(sums: Tensor, alpha: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
            y = sums.float() * alpha
            for each in bias:
                y = y + each
            return (y.round().clamp(-128, 127).to(out) if out is torch.int8 else y.to(out),)

        return compile_(with_own_code(scaled, f"nxm_after_{output}"))

    return after


class Products:
    """All products of a program, on the device."""

    def __init__(self, program: Program, tensors: Mapping[str, Tensor], kernels: Kernels, compile_: Compile) -> None:
        after = epilogue_functions(compile_)
        self._kernels, self._products = kernels, program.products
        self._matrices: dict[str, Matrix] = {}
        self._epilogues: dict[str, Epilogue] = {}
        for node, product in program.products.items():
            if product.weight not in self._matrices:
                self._matrices[product.weight] = Matrix(tensors[product.weight], kernels, two_four=product.two_four)
            self._epilogues[node] = Epilogue(product, tensors, kernels, after)
        self._choices: dict[SizeKey, list[Choice]] = {}
        for choice in sorted(program.choices, key=lambda choice: choice.rows):
            self._choices.setdefault((choice.n, choice.k, choice.output, choice.bias), []).append(choice)

    def parts(self, node: str) -> tuple[Matrix, Epilogue]:
        """The matrix of a product and what follows it."""
        return self._matrices[self._products[node].weight], self._epilogues[node]

    def form_at(self, node: str, rows: int) -> tuple[str, int]:
        """(form, algorithm) of a product at a number of rows: those of the next larger number that was measured, or of
        the largest."""
        product = self._products[node]
        choices = self._choices.get(sizes_of(product), []) if product.two_four else []
        choice = next((choice for choice in choices if rows <= choice.rows), choices[-1] if choices else None)
        return (DENSE, 0) if choice is None else (choice.form, choice.algorithm)

    def run(self, node: str, x: Tensor) -> Tensor:
        """Codes (..., K) times the matrix of a product: (..., N)."""
        from torch.nn import functional

        product = self._products[node]
        matrix, epilogue = self.parts(node)
        flat = x.reshape(-1, product.k)
        rows = flat.shape[0]
        right, below = matrix.codes.shape[1] - product.k, padded(rows, ROWS_STEP) - rows
        if right or below:
            flat = functional.pad(flat, (0, right, 0, below))
        flat = flat.contiguous()
        form, algorithm = self.form_at(node, rows)
        y = multiply(self._kernels, matrix, epilogue, flat, form, algorithm)
        return y[:rows, : product.n].reshape(*x.shape[:-1], product.n)
