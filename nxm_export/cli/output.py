"""Results on stdout: tables for people, JSON for machines."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from nxm_export.cli.tables import print_table
from nxm_export.storage.json_files import json_text


def show_result(result: Any, json: bool, show: Callable[[Any], None]) -> None:
    """The result as JSON, or by `show`; under torchrun the first process alone prints."""
    if int(os.environ.get("RANK", "0")):
        return
    if json:
        click.echo(json_text(result), nl=False)
    else:
        show(result)


def show_facts(title: str, facts: dict[str, Any]) -> None:
    """Facts as tables: one for the weights, one for advice, one for the rest."""
    engines = facts.get("engines")
    if isinstance(engines, dict):
        for name, engine in engines.items():
            show_facts(f"{title}: {name}", engine)
        return
    rest = [(key, value) for key, value in facts.items() if key not in ("weights", "advice", "passport", "schema")]
    print_table(title, ("what", "value"), rest)
    if "weights" in facts:
        columns = ("weight", "K x N", "planned", "float > INT8", "eligible", "sparse", "kernel", "saved ms", "why not")
        table: list[Any] = [
            (
                row["name"].removesuffix(".weight"),
                f"{row['k']}x{row['n']} {row['form']}",
                row["planned"] or "-",
                f"{row['pattern_float'] or 'dense'} > {row['pattern_int8'] or 'dense'}",
                _known(row["eligible"]),
                _known(row["chosen"]),
                (row["kernel"] or "-").split("_tilesize")[0],
                "-" if row["saved_ms"] is None else f"{row['saved_ms']:.4f}",
                row["reason"] or "-",
            )
            for row in facts["weights"]
        ]
        print_table("weights", columns, table)
        for reason, detail in {row["reason"]: row["detail"] for row in facts["weights"] if row["reason"]}.items():
            click.echo(f"{reason}: {detail}")
    if facts.get("advice"):
        table = [
            (entry["name"], "ready" if entry["ready"] else "yes" if entry["one_fix_away"] else "no", entry["advice"])
            for entry in facts["advice"]
        ]
        print_table("advice", ("weight", "one fix away", "what to do"), table)


def _known(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"
