"""JSON files: what is refused, each by file and field, and that what is written is what is read."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nxm_export.errors import ArtifactError, PlanError
from nxm_export.storage.json_files import (
    as_object,
    convert,
    decode,
    encode,
    entry_at,
    parse_json,
    read_foreign_json,
    read_json,
    read_record,
    to_builtins,
    to_json_object,
)

SCHEMA = "nxm-house/2"


@dataclass(frozen=True)
class Window:
    width: int
    panes: tuple[float, ...] = ()


@dataclass(frozen=True)
class House:
    """A record with everything that a file of ours has: nested records, mappings, lists, numbers and what may be
    missing."""

    name: str
    windows: dict[str, Window] = field(default_factory=dict)
    size: tuple[int, int] = (1, 1)
    price: float | None = None
    owners: list[Window] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)


HOUSE = House("a", {"north": Window(3, (0.5, 2.0))}, (2, 4), 1.5, [Window(1)], {"x": [1, None, {"y": True}]})


def rooms_to_windows(old: dict[str, object]) -> dict[str, object]:
    """``nxm-house/1`` called the windows rooms, and had their widths alone."""
    return {"name": old["name"], "windows": {name: {"width": width} for name, width in as_object(old["rooms"]).items()}}


def read(text: str) -> House:
    return decode(
        text,
        House,
        schema=SCHEMA,
        source="house.json",
        way_out="build it again",
        older={"nxm-house/1": rooms_to_windows},
    )


def edited(change: Callable[[dict[str, object]], object]) -> str:
    """The text of `HOUSE` after a change of its JSON."""
    data = json.loads(encode(HOUSE, SCHEMA))
    change(data)
    return json.dumps(data)


def north(data: dict[str, object]) -> dict[str, object]:
    """The JSON of a window of `HOUSE`."""
    return as_object(entry_at(data, "windows", "north"))


def nested(levels: int) -> str:
    return edited(lambda data: as_object(data["notes"]).update(deep=json.loads("[" * levels + "]" * levels)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "house.json: not valid JSON"),
        ("", "house.json: not valid JSON"),
        ("[]", "house.json: not a nxm-house/2 file (schema is None); check the path"),
        ("3", "house.json: not a nxm-house/2 file (schema is None)"),
        (
            edited(lambda data: data.update(schema="nxm-house/3")),
            "house.json: schema nxm-house/3 is not the nxm-house/2 that this version reads; use the nxm-export that "
            "wrote",
        ),
        (edited(lambda data: data.update(schema="nxm-plan/1")), "house.json: not a nxm-house/2 file"),
        (edited(lambda data: data.update(schema=["nxm-house/2"])), "house.json: not a nxm-house/2 file"),
        (edited(lambda data: data.pop("schema")), "house.json: not a nxm-house/2 file (schema is None)"),
        (
            edited(lambda data: data.update(colour="red")),
            "house.json: unknown field colour; it was written by another nxm-export: update, or build it again",
        ),
        (edited(lambda data: north(data).update(glass=1)), "unknown field windows.north.glass;"),
        (edited(lambda data: as_object(entry_at(data, "owners", 0)).update(glass=1)), "unknown field owners[0].glass;"),
        (edited(lambda data: data.pop("name")), "house.json: Object missing required field `name`; build it again"),
        (
            edited(lambda data: as_object(data["windows"]).update(south={})),
            "house.json: windows.south: Object missing required field `width`; build it again",
        ),
        (edited(lambda data: data.update(name=3)), "house.json: name: Expected `str`, got `int`; build it again"),
        (edited(lambda data: data.update(size=[2])), "house.json: size: Expected `array` of length 2, got 1"),
        (edited(lambda data: data.update(size=[2, "4"])), "house.json: size[1]: Expected `int`, got `str`"),
        (edited(lambda data: data.update(size=[2, 4.0])), "house.json: size[1]: Expected `int`, got `float`"),
        (edited(lambda data: data.update(size=[2, True])), "house.json: size[1]: Expected `int`, got `bool`"),
        (edited(lambda data: data.update(price="1.5")), "house.json: price: Expected `float | null`, got `str`"),
        (
            edited(lambda data: data.update(price=10**400)),
            "house.json: not valid JSON (10000000000000000000... is too large for an integer)",
        ),
        (edited(lambda data: data.update(windows=[])), "house.json: windows: Expected `object`, got `array`"),
        (
            edited(lambda data: as_object(data["windows"]).update({"a.b": {"width": "wide"}})),
            "house.json: windows.a.b.width: Expected `int`, got `str`",
        ),
        (
            edited(lambda data: north(data).update(panes=[0.5, None])),
            "house.json: windows.north.panes[1]: Expected `float`, got `null`",
        ),
        ('{"schema": "nxm-house/2", "name": "a", "name": "b"}', "key 'name' stands there twice"),
        ('{"schema": "nxm-house/2", "name": "a", "notes": {"x": 1, "x": 1}}', "key 'x' stands there twice"),
        ('{"schema": "nxm-house/2", "name": "a", "price": NaN}', "NaN is not a JSON number"),
        ('{"schema": "nxm-house/2", "name": "a", "price": Infinity}', "Infinity is not a JSON number"),
        ('{"schema": "nxm-house/2", "name": "a", "notes": {"x": -Infinity}}', "-Infinity is not a JSON number"),
        ('{"schema": "nxm-house/2", "name": "a", "price": 1e999}', "1e999 is too large for a number"),
        ('{"schema": "nxm-house/2", "name": "a", "price": 1' + "0" * 5000 + "}", "not valid JSON"),
        (nested(70), "house.json: not valid JSON (nested more than 64 deep)"),
        ("[" * 100_000, "house.json: not valid JSON"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused_by_file_and_field(text: str, message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        read(text)
    assert message in str(caught.value)
    assert str(caught.value).startswith("house.json: ")


def test_what_is_not_too_deep_is_read() -> None:
    assert read(nested(60)).name == "a"


def test_another_error_class_is_raised_where_it_is_asked_for() -> None:
    for text in ("{", "[]", '{"schema": "nxm-house/2"}', '{"schema": "nxm-house/2", "name": "a", "x": 1}'):
        with pytest.raises(PlanError, match=r"house\.json: "):
            decode(text, House, schema=SCHEMA, source="house.json", way_out="plan again", error=PlanError)


class TestOlder:
    def test_a_former_schema_is_read_as_the_present_one(self) -> None:
        text = '{"schema": "nxm-house/1", "name": "a", "rooms": {"north": 3}}'
        assert read(text) == House("a", {"north": Window(3)})

    def test_a_former_file_that_is_damaged_is_named(self) -> None:
        for text in ('{"schema": "nxm-house/1", "name": "a"}', '{"schema": "nxm-house/1", "name": "a", "rooms": 3}'):
            with pytest.raises(ArtifactError, match=r"house\.json: malformed nxm-house/1 file .*; build it again"):
                read(text)
        with pytest.raises(ArtifactError, match=r"house\.json: windows\.north\.width: Expected `int`, got `str`"):
            read('{"schema": "nxm-house/1", "name": "a", "rooms": {"north": "3"}}')

    def test_present_fields_under_a_former_schema_are_refused(self) -> None:
        with pytest.raises(ArtifactError, match="malformed nxm-house/1 file"):
            read(edited(lambda data: data.update(schema="nxm-house/1")))


numbers = st.integers(-(2**40), 2**40)
windows = st.builds(Window, numbers, st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(tuple))
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
houses = st.builds(
    House,
    st.text(max_size=5),
    st.dictionaries(st.text(max_size=5), windows, max_size=3),
    st.tuples(numbers, numbers),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
    st.lists(windows, max_size=3),
    st.dictionaries(st.text(max_size=5), plain, max_size=3),
)


@given(houses)
def test_a_record_survives_its_text(house: House) -> None:
    text = encode(house, SCHEMA)
    assert read(text) == house
    assert encode(read(text), SCHEMA) == text


@given(houses, st.sampled_from(["name", "windows", "size", "price", "owners", "notes"]), plain)
def test_a_spoiled_field_is_an_artifact_error_or_a_record(house: House, name: str, value: object) -> None:
    data = json.loads(encode(house, SCHEMA)) | {name: value}
    with contextlib.suppress(ArtifactError):
        made = read(json.dumps(data))
        assert read(encode(made, SCHEMA)) == made


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_refused_by_its_field(number: float) -> None:
    for record, place in (
        (replace(HOUSE, price=number), r"House\.price"),
        (replace(HOUSE, windows={"north": Window(1, (0.0, number))}), r"House\.windows\.north\.panes\[1\]"),
        (replace(HOUSE, notes={"x": [{"y": number}]}), r"House\.notes\.x\[0\]\.y"),
        ({"a": (1.0, np.float32(number))}, r"dict\.a\[1\]"),
    ):
        for write in (encode, to_builtins):
            with pytest.raises(ValueError, match=rf"{place} is -?(nan|inf), which JSON does not have"):
                write(record)


def test_numbers_of_numpy_are_numbers_and_paths_are_text() -> None:
    record = {"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True), "d": Path("x"), 4: (np.float64(2.5),)}
    assert to_builtins(record) == {"a": 0.5, "b": 3, "c": True, "d": "x", "4": [2.5]}
    assert [type(value) for value in to_json_object(record).values()] == [float, int, bool, str, list]
    assert json.loads(encode(record)) == to_builtins(record)


def test_a_file_begins_with_its_schema_and_ends_with_a_line_end() -> None:
    text = encode(Window(1, (0.5,)), "nxm-window/1")
    assert text == '{\n "schema": "nxm-window/1",\n "width": 1,\n "panes": [\n  0.5\n ]\n}\n'


def test_a_parsed_value_is_held_to_the_same_rules() -> None:
    assert convert({"width": 2}, Window, source="w", way_out="again") == Window(2)
    with pytest.raises(ArtifactError, match=r"w: unknown field glass; .*again"):
        convert({"width": 2, "glass": 1}, Window, source="w", way_out="again")


def test_a_record_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "house.json").write_text(encode(HOUSE, SCHEMA), encoding="utf-8")
    assert read_record(tmp_path / "house.json", House, schema=SCHEMA, way_out="build it again") == HOUSE


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff", r"not a JSON file \(it is not UTF-8 text\)"), (b"{'a': 1}", "not valid JSON"), (None, "cannot be read")],
)
def test_a_json_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"x\.json: {message}.*; do this"):
        read_json(tmp_path / "x.json", "do this")


@pytest.mark.parametrize(
    ("text", "value"), [("NaN", math.nan), ("Infinity", math.inf), ("-Infinity", -math.inf), ("1e400", math.inf)]
)
def test_a_file_of_others_may_hold_numbers_that_json_does_not_have(tmp_path: Path, text: str, value: float) -> None:
    (tmp_path / "x.json").write_text(f'{{"a": [{text}]}}', encoding="utf-8")
    assert entry_at(read_foreign_json(tmp_path / "x.json", "do this"), "a") == pytest.approx([value], nan_ok=True)
    with pytest.raises(ArtifactError, match=r"x\.json: not valid JSON .*; do this"):
        read_json(tmp_path / "x.json", "do this")


def test_a_record_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for name, content, message in (("none.json", None, "cannot be read"), ("x.json", b"\xff", "not a JSON file")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"{name}: {message}.*; do this"):
            read_record(tmp_path / name, House, schema=SCHEMA, way_out="do this")


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '["\\uDFFF"]', '{"\\ud83d": 1}', '"\\ud83d\\u0041"'])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="half a surrogate pair is no character"):
        parse_json(text, "a.json", "write it again", ArtifactError)
    parse_json(text, "a.json", "write it again", ArtifactError, foreign=True)


def test_a_whole_surrogate_pair_is_one_character() -> None:
    assert parse_json('"\\ud83d\\ude00 \\\\ud800"', "a.json", "write it again", ArtifactError) == "\U0001f600 \\ud800"


@given(
    st.lists(
        st.integers(-(2**70), 2**70).map(str)
        | st.integers(2**63 - 3, 2**63 + 3).map(str)
        | st.floats(allow_nan=False, allow_infinity=False).map(repr)
        | st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,4})?", fullmatch=True),
        max_size=4,
    )
)
def test_a_number_is_refused_exactly_where_it_is_too_large(numbers: list[str]) -> None:
    """Whichever of the two decoders is taken: the fast one is for texts without a large number."""
    text = "[" + ", ".join(numbers) + "]"
    values = json.loads(text)
    fits = [math.isfinite(v) if isinstance(v, float) else -(2**63) <= v < 2**63 for v in values]
    if all(fits):
        assert parse_json(text, "here", "there", ArtifactError) == values
    else:
        with pytest.raises(ArtifactError, match="too large"):
            parse_json(text, "here", "there", ArtifactError)
