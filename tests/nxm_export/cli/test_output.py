"""Messages on a terminal."""

from __future__ import annotations

import pytest

from nxm_export.cli.output import one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain, with \u00e9 and \u4e2d", "plain, with \u00e9 and \u4e2d"),
        ("two\n  lines\r\n\nand a third\n", "two lines and a third"),
        ("\x1b[31mred\x07\x00", "\\x1b[31mred\\x07\\x00"),
        ("right\u202eleft\ud800", "right\\u202eleft\\ud800"),
        ("", ""),
    ],
)
def test_a_message_is_one_line_without_control_characters(text: str, line: str) -> None:
    assert one_line(text) == line
