"""Protobuf's text format, as it is written."""

from __future__ import annotations

from engines.triton.pbtxt import Word, dump


def test_pbtxt_escapes_what_a_string_may_hold() -> None:
    text = dump({"a": 'x"\\\n\u00e9', "b": Word("TYPE_X"), "c": [1, -1], "d": [], "e": [{"f": True}], "g": None})
    assert text == 'a: "x\\042\\134\\012\\303\\251"\nb: TYPE_X\nc: [ 1, -1 ]\ne {\n  f: true\n}\n'
