"""JSON files: one decoder for all that this project writes, and one writer.

A file is one frozen dataclass. `decode` makes it from text and refuses, by file and field: text that is no JSON, a key
that stands there twice, NaN and infinity (JSON has neither; a number like 1e999 is infinite, too), an integer beyond 64
bits, nesting that no file of ours has, another schema, a missing field, a field of another type, and a field that the
dataclass does not know. msgspec does the types; it lets unknown fields pass, so what was read is held against what
would be written again.

`encode` writes such a dataclass. It refuses NaN and infinity, too: a number that is not there is None, and whoever
computes it decides that.

Files of others hold what Python's own writer lets through: `read_foreign_json` takes NaN and infinity as they stand
there, and whoever uses such a number looks at it first.
"""

from __future__ import annotations

import copy
import json
import math
import numbers
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from nxm_export.errors import ArtifactError, PlanError
from nxm_export.storage.unreadable import unreadable

T = TypeVar("T")
Upgrade = Callable[[dict[str, object]], dict[str, object]]

_DEEPEST = 64
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PATH_STEP = re.compile(
    r"\.(\w+)|\[(\d+|\.\.\.)\]"
)  # of msgspec's paths: a field, an index, "..." for a key of a mapping


def parse_json(
    text: str, source: str, way_out: str, error: Callable[[str], Exception], *, foreign: bool = False
) -> object:
    """The value of a JSON text; one that JSON does not allow, or that names a key twice, is an `error` with `source`
    and `way_out`, and so is half a surrogate pair. A `foreign` text, one of others, may hold those, NaN, infinity and
    numbers that are too large for one."""
    decoder = _FOREIGN if foreign else _STRICT if _LARGE_NUMBER.search(text) else _FAST
    try:
        value = decoder.decode(text)
        _require_shallow(value)
        if not foreign:
            _require_characters(text, value)
    except (ValueError, RecursionError) as reason:
        raise error(f"{source}: not valid JSON ({reason}); {way_out}") from reason
    return value


def read_text(file: Path, way_out: str, error: type[Exception] = ArtifactError) -> str:
    """The text of a JSON file; one that cannot be read, or is no UTF-8 text, is an `error` with `way_out`."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as reason:
        raise error(unreadable(file, reason, way_out)) from reason
    except UnicodeDecodeError as reason:
        raise error(f"{file}: not a JSON file (it is not UTF-8 text); {way_out}") from reason


def read_json(file: Path, way_out: str) -> object:
    """The value of a JSON file of this project; raises `ArtifactError` with `way_out` when it cannot be read or is not
    JSON."""
    return parse_json(read_text(file, way_out), str(file), way_out, ArtifactError)


def read_foreign_json(file: Path, way_out: str) -> object:
    """The value of a JSON file of others, such as config.json, which may hold NaN and infinity; raises `ArtifactError`
    as `read_json` does."""
    return parse_json(read_text(file, way_out), str(file), way_out, ArtifactError, foreign=True)


def nonfinite_as_none(value: object) -> object:
    """A parsed JSON value with None for every NaN and infinity in it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: nonfinite_as_none(entry) for key, entry in value.items()}
    return [nonfinite_as_none(entry) for entry in value] if isinstance(value, list) else value


def decode(
    text: str,
    kind: type[T],
    *,
    schema: str,
    source: str,
    way_out: str,
    older: Mapping[str, Upgrade] | None = None,
    error: type[Exception] = ArtifactError,
) -> T:
    """The `kind` (a dataclass) that a JSON text of this `schema` holds.

    `older` reads former schemas: by name, a function from such a file's object to that of `schema`, both without the
    field ``schema``. Raises `error` with `source`, the field, what is wrong with it, and `way_out`.
    """
    value = parse_json(text, source, way_out, error)
    actual = value.get("schema") if isinstance(value, dict) else None
    if older and isinstance(value, dict) and isinstance(actual, str) and actual in older:
        fields = {key: entry for key, entry in value.items() if key != "schema"}
        try:
            fields = older[actual](fields)
        except (LookupError, TypeError, ValueError, AttributeError) as reason:
            raise error(f"{source}: malformed {actual} file ({reason!r}); {way_out}") from reason
    else:
        fields = require_schema(value, schema, source, error)
    return convert(fields, kind, source=source, way_out=way_out, error=error)


def convert(
    value: object,
    kind: type[T],
    *,
    source: str,
    way_out: str,
    error: type[Exception] = ArtifactError,
    foreign: bool = False,
) -> T:
    """The `kind` (a dataclass) that a parsed JSON value holds, with all that `decode` refuses but the schema.

    In a `foreign` file, one of others, fields that `kind` does not know are theirs, and are left alone.
    """
    try:
        made = msgspec.convert(value, type=kind)
    except msgspec.ValidationError as reason:
        what, _, where = str(reason).partition(" - at ")
        field = _field_at(where, value, kind)
        place = f"{source}: {field}" if field else source
        raise error(f"{place}: {what}; {way_out}") from reason
    if foreign:
        return made
    unknown = next(_unknown_fields(value, msgspec.to_builtins(made), ""), None)
    if unknown is not None:
        raise error(f"{source}: unknown field {unknown}; it was written by another nxm-export: update, or {way_out}")
    return made


def read_record(
    file: Path,
    kind: type[T],
    *,
    schema: str,
    way_out: str,
    older: Mapping[str, Upgrade] | None = None,
) -> T:
    """`decode` of a file; raises `ArtifactError`, too, when it cannot be read."""
    return decode(read_text(file, way_out), kind, schema=schema, source=str(file), way_out=way_out, older=older)


def read_lines(file: Path, kind: type[T], *, way_out: str) -> tuple[T, ...]:
    """The records of a JSON-lines file, whose lines have no schema; raises `ArtifactError` with the number of the line.

    A last line that was cut, as its writer was killed, is left out. NaN and infinity are None: former versions wrote
    them for a number that could not be computed.
    """
    lines = read_text(file, way_out).split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        source, is_cut = f"{file}:{number}", number == len(lines)
        if is_cut and not line:
            continue
        try:
            value = parse_json(line, source, way_out, ArtifactError, foreign=True)
        except ArtifactError:
            if is_cut:
                continue
            raise
        records.append(convert(nonfinite_as_none(value), kind, source=source, way_out=way_out))
    return tuple(records)


def encode_line(record: object) -> str:
    """A line of a JSON-lines file, with its end; raises `ValueError` as `encode` does."""
    return json.dumps(to_builtins(record), allow_nan=False) + "\n"


def encode(record: object, schema: str | None = None) -> str:
    """The text of a JSON file that holds `record` (a dataclass, or plain JSON values), under `schema`.

    Raises `ValueError` that names the field for NaN and infinity.
    """
    value = to_builtins(record) if schema is None else {"schema": schema, **to_json_object(record)}
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def to_builtins(record: object) -> object:
    """A record as JSON values: dictionaries, lists, strings, numbers; raises `ValueError` that names the field for NaN
    and infinity."""
    return _finite_lists(msgspec.to_builtins(record, str_keys=True, enc_hook=_plain), type(record).__name__)


def to_json_object(record: object) -> dict[str, object]:
    """`to_builtins` of a record that is a JSON object: of a dataclass, or of a mapping; raises `TypeError` for
    others."""
    return as_object(to_builtins(record))


def as_object(value: object) -> dict[str, object]:
    """A parsed JSON value that must be an object; raises `TypeError` where it is none."""
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.80} is no JSON object")
    return value


def as_objects(value: object) -> list[dict[str, object]]:
    """A parsed JSON value that must be a list of objects; raises `TypeError` where it is none."""
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.80} is no JSON list")
    return [as_object(entry) for entry in value]


def entry_at(value: object, *path: str | int) -> object:
    """The entry of a parsed JSON value at a path of keys and indices; raises `LookupError` where there is none."""
    for key in path:
        if isinstance(value, dict) and key in value:
            value = value[key]
            continue
        if not isinstance(value, list) or not isinstance(key, int) or not 0 <= key < len(value):
            raise LookupError(f"there is no {key!r} in {value!r:.80}")
        value = value[key]
    return value


def require_schema(data: object, schema: str, source: str, error: type[Exception] = PlanError) -> dict[str, object]:
    """The fields of a JSON object of exactly this `schema`, without it; others are refused with the way out."""
    actual = data.get("schema") if isinstance(data, dict) else None
    if isinstance(data, dict) and actual == schema:
        return {key: entry for key, entry in data.items() if key != "schema"}
    if isinstance(actual, str) and actual.partition("/")[0] == schema.partition("/")[0]:
        raise error(
            f"{source}: schema {actual} is not the {schema} that this version reads; use the nxm-export that wrote it, "
            "or write it again"
        )
    raise error(f"{source}: not a {schema} file (schema is {actual!r}); check the path")


def _plain(value: object) -> object:
    """What msgspec does not know, as JSON: NumPy's numbers and truth values are Python's, a path and the like is its
    text."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    is_truth = type(value).__name__ in ("bool", "bool_")  # numpy.bool is registered as no kind of number
    return bool(value) if is_truth else str(value)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"key {twice!r:.80} stands there twice")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is too large for a number")
    return number


def _machine_integer(text: str) -> int:
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{text[:20]}{'...' if len(text) > 20 else ''} is too large for an integer")
    return number


# Where no number can be too large, none is handed to a function: that takes most of the time of a long list.
_LARGE_NUMBER = re.compile(r"[0-9]{19}|[eE][+]?[0-9]{2}")
_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite_float, parse_int=_machine_integer
)
_FAST = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
_FOREIGN = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _require_characters(text: str, value: object) -> None:
    """Refuse half a surrogate pair, which JSON can write and no file or terminal can."""
    if not _SURROGATE.search(text):
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair is no character") from error


def _require_shallow(value: object) -> None:
    level, depth = [value], 0
    while level:
        if depth >= _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")
        level = [
            item
            for entry in level
            for item in (entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ())
            if type(item) is list or type(item) is dict
        ]
        depth += 1


def _unknown_fields(read: object, made: object, path: str) -> Iterator[str]:
    """The fields of `read` that are not in `made`, what its dataclass would write."""
    if isinstance(read, dict) and isinstance(made, dict):
        for key, entry in read.items():
            if key not in made:
                yield f"{path}{key}"
            else:
                yield from _unknown_fields(entry, made[key], f"{path}{key}.")
    elif isinstance(read, list) and isinstance(made, (list, tuple)):
        for at, (entry, other) in enumerate(zip(read, made)):  # noqa: B905  (msgspec keeps lengths)
            yield from _unknown_fields(entry, other, f"{path.rstrip('.')}[{at}].")


def _field_at(where: str, value: object, kind: type[object]) -> str:
    """msgspec's path of the field that it refused in `value`, with the keys of mappings, which it leaves out."""
    names, probe = "", copy.deepcopy(value)
    node: object = probe
    for name, index in _PATH_STEP.findall(where):
        key: str | int | None
        if index == "...":
            key = _refused_key(as_object(node), probe, kind)
            if key is None:
                return names
        else:
            key = name or int(index)
        names += f"[{key}]" if isinstance(key, int) else f".{key}" if names else key
        node = entry_at(node, key)
    return names


def _refused_key(entries: dict[str, object], whole: object, kind: type[object]) -> str | None:
    """The key of `entries`, a mapping inside `whole`, that msgspec refuses; it alone is left there."""
    every = dict(entries)
    for key, entry in every.items():
        entries.clear()
        entries[key] = entry
        try:
            msgspec.convert(whole, type=kind)
        except msgspec.ValidationError:
            return key
    return None


def _finite_lists(value: object, path: str) -> object:
    """`value` with lists for tuples; raises `ValueError` that names the first number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}, which JSON does not have")
    if isinstance(value, dict):
        return {key: _finite_lists(entry, f"{path}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_lists(entry, f"{path}[{at}]") for at, entry in enumerate(value)]
    return value
