"""Numbers in texts of users: plain digits, and nothing else that Python's int and float take."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nxm_export.contract.plain_numbers import real_number, size_of, whole_number

NO_NUMBERS = (
    "",
    " ",
    "1_0",
    "١٢",
    "１０",
    "infinity",
    "-inf",
    "nan",
    "0x10",
    "1 0",
    "--1",
    ".",
    "e5",
    "1e",
    "1,5",
    "²",
)


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number_is_none(text: str) -> None:
    assert (whole_number(text), real_number(text), size_of(text)) == (None, None, None)


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
def test_what_python_writes_is_read_back(whole: int, real: float) -> None:
    assert (whole_number(str(whole)), real_number(str(real))) == (whole, real)


@pytest.mark.parametrize("text", ["+5", "5.", ".5", " 5e-1\t", "-0.5E+2"])
def test_signs_points_exponents_and_spaces_are_plain(text: str) -> None:
    assert real_number(text) == float(text)


def test_numbers_too_large_for_python_are_none_and_are_found_so_at_once() -> None:
    assert whole_number("9" * 10_000) is None
    assert (real_number("1e999"), real_number("9" * 1_000_000 + "x")) == (None, None)
    assert math.isfinite(real_number("1e308") or math.inf)


def test_a_size_is_above_zero_and_has_digits_alone() -> None:
    assert [size_of(text) for text in ("8", "08", "0", "-8", "+8", "8.0")] == [8, 8, None, None, None, None]
