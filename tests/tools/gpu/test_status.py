"""What the documents say of GPUs is what docs/gpu holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from nxm_export.errors import DataError
from tools.gpu.pages import write_page
from tools.gpu.status import GAIN, INDEX, README, SECTION, pages, sections
from tools.rendering import read_section


def test_the_documents_say_what_there_is() -> None:
    for document, text in sections(pages()).items():
        assert read_section(document, SECTION) == text, "python -m tools.gpu.status --write"


def test_every_page_is_named_with_its_day(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Evidence\n")
    assert pages(tmp_path) == []
    write_page(tmp_path, "products", "NVIDIA H200", {"torch": "2.11"}, ["## Times"], ["products.json"])
    (tmp_path / "l4-11.4.md").write_text(
        "# L4, TensorRT 11.4\n\nWritten by `tools/gpu/evidence.py` on 2026-01-02; raw\n"
    )
    found = pages(tmp_path)
    assert [page.title for page in found] == ["L4, TensorRT 11.4", "Products on NVIDIA H200"]
    said = sections(found)
    assert "[L4, TensorRT 11.4](docs/gpu/l4-11.4.md) (2026-01-02), [Products on NVIDIA H200](docs" in said[README]
    assert "| [L4, TensorRT 11.4](l4-11.4.md) | 2026-01-02 |" in said[INDEX]
    assert "(gpu/l4-11.4.md)" in said[GAIN]
    assert not any("yet" in text for text in said.values())


@pytest.mark.parametrize("gpu", ["stand-in", None])
def test_a_rehearsal_and_a_page_of_nothing_are_no_evidence(gpu: str | None, tmp_path: Path) -> None:
    if gpu is None:
        (tmp_path / "a.md").write_text("nothing\n")
    else:
        write_page(tmp_path, "products", gpu, {}, ["## Times"], ["products.json"])
    with pytest.raises(DataError, match="no title or no date" if gpu is None else "is of a rehearsal on a CPU"):
        pages(tmp_path)
