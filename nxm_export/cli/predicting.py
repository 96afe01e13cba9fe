"""The command that answers texts: predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engines.serving.settings import ModelOptions
from nxm_export.cli.group import command
from nxm_export.cli.options import (
    COLUMN_OPTIONS,
    Whole,
    columns_of,
    expect_sha256_option,
    expected_hashes,
    json_option,
    setting_option,
    settings_of,
)
from nxm_export.cli.output import print_next, quoted, show_result
from nxm_export.contract.choices import HINTS

if TYPE_CHECKING:
    from nxm_export.contract.tasks import Task
    from nxm_export.data.predictions import AnyPrediction
    from nxm_export.data.texts import Text


@command('nxm predict engine "a wonderful film" "a dull story"', "nxm predict engine --data texts.tsv --json")
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--data", metavar="FILE", help="Answer the texts of this file; labels in it are not read.")
@COLUMN_OPTIONS
@click.option(
    "--pairs", is_flag=True, help="Take TEXTs two by two; by itself where the task reads pairs: question and context."
)
@click.option("--batch", type=Whole(min=1), default=32, show_default=True, help="Texts that run at once.")
@click.option("--threads", type=Whole(min=1), help="CPU threads.  [default: as built]")
@click.option(
    "--hint",
    type=click.Choice(HINTS),
    help="What the threads are for: one batch at a time, or many.  [default: throughput for more than one batch]",
)
@setting_option(ModelOptions, "gate")
@expect_sha256_option
@json_option
def predict(engine: Path, texts: tuple[str, ...], data: str | None, pairs: bool, json: bool, **options: object) -> None:
    """Answer texts with an engine, on this machine.

    The answer to a TEXT is a class, labels, a score, entities, an answer or a vector, as the engine's task has it. It
    takes the directory ENGINE alone, neither torch nor transformers.
    """
    from engines.predictor import Predictor, hint_for
    from nxm_export.contract.io_spec import load_spec
    from nxm_export.contract.tasks import TASKS
    from nxm_export.data.texts import read_texts, text_read

    task = TASKS[load_spec(engine).task]
    if bool(texts) == bool(data):
        raise click.UsageError("give either TEXTs, or --data with a file of them")
    if data is None and (options["text"] or options["text_pair"]):
        raise click.UsageError("--text-column and --pair-column name columns of --data")
    if data is not None and pairs:
        raise click.UsageError("--pairs is for TEXTs; the columns of --data say what is a pair (--pair-column)")
    columns = columns_of(_text(options["text"]), _text(options["text_pair"]), None)
    rows = read_texts(data, columns, task) if data else _rows(texts, pairs or task.texts == "two", task)
    proof = settings_of(ModelOptions, options)
    batch = _number(options["batch"]) or 1
    with Predictor(
        engine,
        threads=_number(options["threads"]),
        hint=_text(options["hint"]) or hint_for(engine, len(rows), batch),
        gate=proof.gate,
        expect_sha256=expected_hashes(options),
    ) as predictor:
        results = predictor.predict(rows, batch=batch)
        shortened = predictor.shortened
    answers = [{"input": text_read(row), **result.to_dict()} for row, result in zip(rows, results, strict=True)]
    show_result(lambda: answers, json, lambda: _print(rows, results))
    if not json:
        print_next(f"nxm serve {quoted(engine)} --text")
    if shortened:
        longest = load_spec(engine).max_length
        click.echo(
            f"nxm: {shortened} of {len(rows)} texts were cut at {longest} tokens, the engine's longest input", err=True
        )


def _rows(texts: Sequence[str], pairs: bool, task: Task) -> list[Text]:
    if not pairs:
        return [*texts]
    if len(texts) % 2:
        raise click.UsageError(f"{len(texts)} TEXTs are not pairs; {task.name} reads them two by two here")
    return [*zip(texts[::2], texts[1::2], strict=True)]


def _print(rows: Sequence[Text], results: Sequence[AnyPrediction]) -> None:
    """One line for every text: the answer, how sure it is, and the text."""
    from nxm_export.data.texts import text_read

    for row, result in zip(map(text_read, rows), results, strict=True):
        shown = row if isinstance(row, str) else " | ".join(row)
        click.echo(f"{line_of(result)}\t{' '.join(shown.split())}")


def line_of(result: AnyPrediction) -> str:
    """A result in words, for a line of its own."""
    from nxm_export.data.predictions import Answer, Embedding, LabelSet, Prediction, TaggedText

    if isinstance(result, Prediction):
        return f"{result.label}\t{result.score:.3f}"
    if isinstance(result, LabelSet):
        return ", ".join(f"{label.label} {label.score:.3f}" for label in result.labels) or "no label"
    if isinstance(result, TaggedText):
        return ", ".join(f"{entity.label}: {entity.text}" for entity in result.entities) or "no entity"
    if isinstance(result, Answer):
        return f"{result.text if result.found else 'no answer'}\t{result.score:.3f}"
    if isinstance(result, Embedding):
        first = " ".join(f"{value:.3f}" for value in result.vector[:3])
        return f"{len(result.vector)} numbers: {first} ..."
    return f"{result.score:.4g}"


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None
