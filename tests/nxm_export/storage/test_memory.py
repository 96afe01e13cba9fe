"""What is available, by the machine and by the container, and the refusal of what is beyond it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nxm_export.errors import EngineError
from nxm_export.storage import memory

MEMINFO = "MemTotal:       24000000 kB\nMemFree:         100000 kB\nMemAvailable:    8000000 kB\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8.192 GB available, and no container."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    (tmp_path / "meminfo").write_text(MEMINFO)
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "used", "statistics", "expected"),
    [
        (None, None, None, 8_192_000_000),
        ("max", "5", "", 8_192_000_000),
        ("3000000000", "1000000000", "anon 5\ninactive_file 400000000\n", 2_400_000_000),
        ("3000000000", "1000000000", None, 2_000_000_000),
        ("1000", "2000", "", 0),
        ("90000000000", "0", "", 8_192_000_000),
    ],
)
def test_a_container_has_what_its_limit_leaves(
    machine: Path, limit: str | None, used: str | None, statistics: str | None, expected: int
) -> None:
    for name, text in (("memory.max", limit), ("memory.current", used), ("memory.stat", statistics)):
        if text is not None:
            (machine / name).write_text(text)
    assert memory.available_memory() == expected


@pytest.mark.parametrize("text", [None, "", "MemAvailable: many kB\n", "MemAvailable:\n"])
def test_a_machine_that_does_not_say_refuses_nothing(machine: Path, text: str | None) -> None:
    (machine / "meminfo").unlink() if text is None else (machine / "meminfo").write_text(text)
    assert memory.available_memory() is None
    memory.require_memory(10**18, "anything", "buy more")


def test_what_is_beyond_the_machine_is_refused_with_the_numbers_and_the_way_out(machine: Path) -> None:
    memory.require_memory(8_192_000_000, "this", "do less")
    with pytest.raises(EngineError, match=r"this needs at least 9\.0 GB of memory, and 8\.2 GB are available.*do less"):
        memory.require_memory(9_000_000_000, "this", "do less")
