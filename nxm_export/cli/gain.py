"""What `nxm doctor` prints of a gain: verdict first, then where each number comes from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nxm_export.cli.options import shape_of
from nxm_export.cli.output import show_result
from nxm_export.cli.tables import print_table, terminal_width
from nxm_export.errors import EngineError

if TYPE_CHECKING:
    from engines.sparsity.gain import GainEstimate, ProductTimes
    from engines.sparsity.gain_report import Gain, GainReport

_EXISTS = {True: "yes", False: "no", None: "unknown"}


def asks_for_gain(file: Path, shape: str | None) -> bool:
    """True where `nxm doctor` is asked what 2:4 gains, and not what stands in the way in a file."""
    from nxm_export.pipeline.sparsity_gain import is_model_directory

    return shape is not None or is_model_directory(file)


def show_gain(
    file: Path, shape: str | None, gpu: str, backend: str, version: str | None, *, parse: bool, json: bool
) -> None:
    """Print what 2:4 can gain for FILE at `shape`."""
    from nxm_export.pipeline.sparsity_gain import GAIN_SHAPE, expected_gain

    if parse:
        raise click.UsageError("--parse asks about an ONNX file alone; leave it out, or leave --shape out")
    try:
        report = expected_gain(
            file, gpu, GAIN_SHAPE if shape is None else shape_of(shape), backend=backend, version=version
        )
    except EngineError as error:
        raise click.UsageError(str(error)) from error
    show_result(report.to_dict, json, lambda: _print(report))


def _print(report: GainReport) -> None:
    _say(f"verdict: {report.verdict}")
    if report.gain is None:
        if report.target is not None:  # the verdict for a CPU says it
            dense = report.target.multiplies_int8
            click.echo(
                "INT8 without a pattern needs no sparse kernel: --pattern none"
                if dense
                else "Its tensor cores, if it has any, multiply no INT8 either: stay with FP16"
            )
        return
    _say("Nothing here is measured; docs/will-it-pay.md has the assumptions.")
    title = f"{report.model} on {report.gpu} at {report.batch}x{report.sequence}"
    print_table(title, ("what", "value"), list(_facts(report, report.gain)))
    columns = ("product", "K x N", "runs", "from memory", "from cache", "limit from memory")
    print_table("INT8 > 2:4, us a run at the limits (estimate)", columns, list(_products(report.gain.estimate)))
    for note in report.notes:
        _say(f"note: {note}")


def _say(sentence: str) -> None:
    click.echo(textwrap.fill(sentence, terminal_width(), break_long_words=False, break_on_hyphens=False))


def _facts(report: GainReport, gain: Gain) -> Iterator[tuple[str, str]]:
    from engines.sparsity.gain_report import first_shape

    figures, tokens = gain.figures, gain.bound.arithmetic_from_tokens
    yield "bound", f"{gain.bound.speedup:.2f}x, that of the product which gains most"
    for where, one in (("memory", gain.estimate.memory), ("cache", gain.estimate.cache)):
        times = f"FP16 {one.fp16_ms:.3g} ms, INT8 {one.int8_ms:.3g} ms, 2:4 {one.sparse_ms:.3g} ms"
        yield f"estimate, {where}", times
    if gain.estimate.memory.product_share is not None and gain.estimate.cache.product_share is not None:
        shares = f"{gain.estimate.memory.product_share:.0%} (memory), {gain.estimate.cache.product_share:.0%} (cache)"
        yield "in products", f"{shares} of the INT8 time"
    yield (
        "weights",
        f"from memory, are no limit of 2:4 from {tokens} tokens ({first_shape(tokens, report.sequence)}) on",
    )
    yield "kernels", f"{report.runtime}: INT8 out {_kernels(report, 'int8')}; FP16 out {_kernels(report, 'float16')}"
    yield (
        "peaks",
        f"{figures.int8_tops:g} TOPS INT8, {figures.memory_gb_per_second:g} GB/s, {figures.cache_mb:g} MB of cache",
    )


def _kernels(report: GainReport, output: str) -> str:
    """Whether kernels with this output exist: one word where all forms of a product have the same answer."""
    answers = {kernel.form: _EXISTS[kernel.exists] for kernel in report.kernels if kernel.output == output}
    if len(set(answers.values())) == 1:
        return next(iter(answers.values()))
    return ", ".join(f"{form} {answer}" for form, answer in answers.items())


def _products(estimate: GainEstimate) -> Iterator[tuple[str, ...]]:
    """A row for all products of one shape."""
    alike: dict[tuple[int, int], list[tuple[ProductTimes, ProductTimes]]] = {}
    for pair in zip(estimate.memory.products, estimate.cache.products, strict=True):
        alike.setdefault((pair[0].k, pair[0].n), []).append(pair)
    for (k, n), pairs in alike.items():
        memory, cache = pairs[0]
        more = f", +{len(pairs) - 1}" if len(pairs) > 1 else ""
        yield (
            f"{memory.name.removesuffix('.weight')}{more}",
            f"{k}x{n}",
            str(sum(product.runs for product, _ in pairs)),
            f"{memory.int8_us:.3g} > {memory.sparse_us:.3g}",
            f"{cache.int8_us:.3g} > {cache.sparse_us:.3g}",
            memory.sparse_limit,
        )
