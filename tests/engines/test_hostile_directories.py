"""Three hundred damaged and malicious engine directories, generated: `nxm serve`, `nxm predict` and `nxm triton` refuse
each with one line, or answer with finite numbers. Nothing else may happen: no traceback, no hang, nothing half-written.

Half of them carry hashes that fit the damage, so that what reads the files has to notice it, too.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from engines.passport import companion_hashes
from engines.serving.model import open_model
from engines.serving.settings import ModelOptions
from nxm_export.cli import main
from nxm_export.errors import NxmError
from nxm_export.storage.hashing import file_hash
from tests.support import exact_engine
from tests.support.variants import variants

FILES = ("spec.json", "tokenizer.json", "passport.json", "parity.json", "model.onnx")
CASES = 300
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, 1e308, 2**31, 2**63, -(2**63) - 1, 10**300, "", "x", "\u0000", "\ud800", "../..",
    "/etc/passwd", "é" * 300, [], [[]], [None], {}, {"": {}}, [1] * 1000, ["a", 1], {"a": 1}, "\n", "Traceback",
)  # fmt: skip


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes cut off, flipped, repeated, or of something else."""
    kind = chance.randrange(8)
    at = chance.randrange(len(data))
    if kind < 2:
        return data[:at]
    if kind < 5:
        flipped = bytearray(data)
        for _ in range(chance.choice((1, 1, 8))):
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        return bytes(flipped)
    return (data[:at] + data, b"", chance.randbytes(200))[kind - 5]


def damaged_json(data: bytes, chance: random.Random) -> bytes:
    """Valid JSON or nearly so: another value somewhere, a missing or a foreign key, depth, what JSON does not have."""
    value = json.loads(data)
    places = list(_places(value))
    holder, key = chance.choice(places)
    kind = chance.randrange(10)
    if kind < 6:
        holder[key] = chance.choice(JUNK)
    elif kind == 6:
        del holder[key]
    elif kind == 7:
        holder[key] = chance.choice((float("nan"), float("inf"), [holder[key]], {"x": holder[key]}))
    text = json.dumps(value)
    if kind == 8:
        text = text.replace("{", '{"colour": "red", ', 1)
    elif kind == 9:
        depth = chance.choice((70, 2_000, 200_000))
        text = chance.choice(("[" * depth, '{"a":' * depth + "1" + "}" * depth, text[:-1] + ', "deep": ' + "[" * depth))
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any, limit: int = 400) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(found) < limit:
        holder = waiting.pop(0)
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return found


def replaced(file: Path, chance: random.Random) -> None:
    """What is no regular file: none, a directory, a link into nowhere or in a circle, a pipe's worth of nothing."""
    file.unlink()
    kind = chance.randrange(4)
    if kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to("nowhere")
    elif kind == 3:
        file.symlink_to(file.name)


def damage(directory: Path, number: int) -> str:
    """Damage one file, by a seed; returns what was done."""
    chance = random.Random(number)
    name = FILES[number % len(FILES)]
    file = directory / name
    how = chance.choice(("bytes", "json", "json", "json", "place")) if name != "model.onnx" else "bytes"
    if how == "place":
        replaced(file, chance)
    else:
        make: Callable[[bytes, random.Random], bytes] = damaged_bytes if how == "bytes" else damaged_json
        file.write_bytes(make(file.read_bytes(), chance))
    if number // len(FILES) % 2 and name not in ("passport.json", "parity.json"):
        fit_hashes(directory)
        how += ", with hashes that fit"
    return f"{name}: {how}"


def fit_hashes(directory: Path) -> None:
    passport = json.loads((directory / "passport.json").read_text())
    try:
        passport |= {
            "engine_sha256": file_hash(directory / "model.onnx"),
            "companions": companion_hashes(directory),
        }
    except NxmError:
        return  # no file, whose hash nobody could have written down
    (directory / "passport.json").write_text(json.dumps(passport))
    if (directory / "parity.json").is_file():
        exact_engine.write_parity(directory, passed=True)


def refusal_of(arguments: list[str]) -> str | None:
    """The one line of a command that is refused; None for one that is done."""
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback (most" not in result.output
    if result.exit_code == 0:
        return None
    assert result.exit_code in (1, 3), result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("{")]  # the log of a server
    assert len(lines) == 1, result.output
    assert lines[0].startswith(("nxm: ", "Error: ")), lines
    assert len(lines[0]) < 2000, lines[0][:3000]
    return lines[0]


@pytest.mark.parametrize("part", variants(range(10), (), slow=(0, 1)))
def test_a_damaged_directory_is_refused_in_one_line_or_answers(engine: Path, tmp_path: Path, part: int) -> None:
    refused = 0
    for number in range(part, CASES, 10):
        directory = Path(shutil.copytree(engine, tmp_path / f"engine-{number}"))
        what = damage(directory, number)
        repository = tmp_path / f"repository-{number}"
        try:
            open_model("m", "1", directory, ModelOptions(instances=1, text=True)).close()
            served = True
        except NxmError:
            served = False
        commands = (
            ["predict", str(directory), "a good film", "bad"],
            ["triton", f"m={directory}", "--out", str(repository), "--text"],
            *([["serve", f"m={directory}", "--port", "0", "--text", "--instances", "1"]] if not served else []),
        )
        refusals = [refusal_of(command) for command in commands]
        refused += not served
        assert repository.exists() == (refusals[1] is None), what
        assert served or refusals[2] is not None, what
    assert refused > CASES // 10 // 2
