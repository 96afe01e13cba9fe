"""What an engine runs on here, in words: the CPU as Linux names it, or the GPU of its passport."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engines.devices import cpu_device, running_on
from tests.support.records import PASSPORT


def test_an_engine_runs_on_this_cpu_or_on_the_gpu_of_its_passport() -> None:
    device = cpu_device()
    assert running_on(PASSPORT) == (
        f"{device['name']} ({device['features']})" if device.get("features") else device.get("name")
    )
    assert running_on(replace(PASSPORT, backend="trt", requires={"gpu": "L4"})) == "L4"
    assert running_on(replace(PASSPORT, backend="trt")) is None
    assert running_on(replace(PASSPORT, backend="of another version")) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: A CPU\nflags\t\t: sse avx2 avx512_vnni avx512f\n", "A CPU (avx2 avx512f avx512_vnni)"),
        ("model name\t: A CPU\nflags\t\t: sse\n", "A CPU"),
        ("", "unknown"),
        (None, None),
    ],
)
def test_a_cpu_is_named_with_its_instruction_sets_as_far_as_linux_says(
    text: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def given(file: Path, *arguments: object, **options: object) -> str:
        if str(file) != "/proc/cpuinfo":
            return read(file, *arguments, **options)  # type: ignore[arg-type]  # as it was called
        if text is None:
            raise FileNotFoundError(file)
        return text

    monkeypatch.setattr(Path, "read_text", given)
    assert running_on(PASSPORT) == expected
