"""Whatever stands in the JSON files of an engine directory, every command that reads it ends with an answer or with an
error of ours."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from engines.passport import load_passport
from nxm_export.cli import main
from nxm_export.contract.io_spec import load_spec
from nxm_export.errors import ArtifactError
from tests.support import exact_engine

ODD: tuple[object, ...] = (
    None,
    -1,
    0,
    10**18,
    10**40,
    1.5,
    1e300,
    "x",
    "",
    [],
    {},
    [[]],
    True,
    ["a"],
    {"a": 1},
    [1, 2],
    "../x",
)
FILES = ("passport.json", "spec.json", "parity.json")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exact_engine.build(tmp_path_factory.mktemp("hostile") / "engine", parity=True)


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value inside a JSON value."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def replaced(value: object, path: tuple[str | int, ...], new: object) -> object:
    """`value` with `new` at `path`."""
    if not path:
        return new
    made = node = copy.deepcopy(value)
    for key in path[:-1]:
        node = node[key]  # type: ignore[index]
    node[path[-1]] = new  # type: ignore[index]
    return made


def variants_of(engine: Path) -> list[tuple[str, object]]:
    """Every file of the engine with an odd value at every place, in an order drawn once."""
    cases = []
    for name in FILES:
        value = json.loads((engine / name).read_text())
        cases += [(name, replaced(value, path, odd)) for path in places(value) for odd in ODD]
    random.Random(0).shuffle(cases)
    return cases


def survives(directory: Path, out: Path) -> None:
    for arguments in (
        ["inspect", str(directory), "--json"],
        ["predict", str(directory), "good film"],
        ["triton", f"a={directory}", "--text", "--out", str(out)],
        ["bench", str(directory), "--rounds", "1", "--shape", "1x4"],
        ["latency", str(directory), "--rounds", "1", "--shape", "1x4", "--out", str(out.with_name("ms.json"))],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)


@pytest.mark.parametrize("count", [20, pytest.param(600, marks=pytest.mark.slow)])
def test_no_value_anywhere_is_a_traceback(count: int, engine: Path, tmp_path: Path) -> None:
    for name, value in variants_of(engine)[:count]:
        shutil.rmtree(tmp_path / "engine", ignore_errors=True)
        directory = Path(shutil.copytree(engine, tmp_path / "engine"))
        (directory / name).write_text(json.dumps(value))
        survives(directory, tmp_path / "repository")


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("threads", True, r"options: threads: Expected `int \| null`, got `bool`"),
        ("threads", 0, "options: threads is 0"),
        ("threads", 10**6, "options: threads is 1000000"),
        ("disabled_optimizers", 3, "options: disabled_optimizers: Expected `array`"),
        ("float_products", [1], r"options: float_products\[0\]: Expected `str`"),
        ("build_route", 7, "options: build_route"),
        ("workspace_bytes", "much", "options: workspace_bytes"),
    ],
)
def test_an_option_of_another_type_is_refused_by_its_name(
    option: str, value: object, complaint: str, engine: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(engine, tmp_path / "engine"))
    passport = json.loads((directory / "passport.json").read_text())
    passport["options"][option] = value
    (directory / "passport.json").write_text(json.dumps(passport))
    with pytest.raises(ArtifactError, match=complaint):
        load_passport(directory)


def test_a_number_beyond_64_bits_is_refused_as_it_is_read(engine: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(engine, tmp_path / "engine"))
    spec = json.loads((directory / "spec.json").read_text())
    (directory / "spec.json").write_text(json.dumps({**spec, "max_length": 10**40}))
    with pytest.raises(ArtifactError, match=r"spec\.json: not valid JSON \(1000.*\.\.\. is too large for an integer\)"):
        load_spec(directory)


@pytest.mark.parametrize("other", ["a_text", "a_tokenizer", "A_labels", "A"])
def test_models_that_would_be_one_directory_are_refused(other: str, engine: Path, tmp_path: Path) -> None:
    arguments = ["triton", f"a={engine}", f"{other}={engine}", "--text", "--out", str(tmp_path / "repository")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert " and ".join(sorted(("a", other))) + " both need the name" in result.output
    assert not (tmp_path / "repository").exists()
