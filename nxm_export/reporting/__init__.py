"""What people look at: one HTML page of a run, and a model card, both made from the files that the stages wrote.

`nxm report` and `nxm card`. Nothing is measured here and no number is typed: facts are read (`run_facts`), judged in
words (`verdicts`), drawn (`plots`) and put into templates (`page`, `hub_card`). A run may be unfinished; what is
missing is said.
"""

from __future__ import annotations

from pathlib import Path

from nxm_export.errors import ArtifactError
from nxm_export.own_packages import require_own_packages
from nxm_export.storage.atomic import require_new, write_atomic

require_own_packages()  # what is in here imports `compressors` and `engines`

REPORT_FILE = "report.html"
_PAGES = (".html", ".htm", ".md")


def report(
    run: str | Path, out: str | Path | None = None, *, search: str | Path | None = None, force: bool = False
) -> Path:
    """Write the page of a run directory to `out` and return its path; by default it is ``RUN/report.html``, again and
    again, and a file that is at another `out` is replaced with `force` alone.

    `search` is a directory of `nxm search` to show beside the run (``RUN/search`` by default). Raises `ArtifactError`
    when `run` is no run or nothing has been made in it yet; needs jinja2 and matplotlib (``nxm-export[report]``).
    """
    if out is not None:
        require_new(out, force=force)  # before anything is read or drawn
        _require_no_source(Path(out), run, *([] if search is None else [search]))
    from nxm_export.reporting.page import render
    from nxm_export.reporting.plots import pictures
    from nxm_export.reporting.run_facts import read_run

    facts = read_run(run, search)
    return _write(Path(out) if out is not None else facts.root / REPORT_FILE, render(facts, pictures(facts)))


def card(
    source: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    base_model: str | None = None,
    license: str | None = None,
) -> Path:
    """Write the model card of a run, a checkpoint or an engine directory to `out` and return its path; a file that is
    there is replaced with `force` alone.

    `base_model` is the hub id of the model that was compressed, `license` the hub's word for that of the result: no
    file says them. Raises `ArtifactError` when `source` is none of these; needs jinja2 (``nxm-export[report]``).
    """
    require_new(out, force=force)
    _require_no_source(Path(out), source)
    from nxm_export.reporting.hub_card import Origins, render

    return _write(Path(out), render(Path(source), Origins(base_model, license)))


def _require_no_source(out: Path, *sources: str | Path) -> None:
    """Raise `ArtifactError` where `out` is a file of what a page is about, and no page itself: `force` is for pages."""
    inside = any(Path(source).resolve() in out.resolve().parents for source in sources)
    if inside and out.exists() and out.suffix.lower() not in _PAGES:
        raise ArtifactError(f"{out} is a file of what is shown, and no page of it; choose another --out")


def _write(out: Path, text: str) -> Path:
    if not out.parent.is_dir():
        raise ArtifactError(f"{out.parent}: no such directory; make it, or choose another --out")
    write_atomic(out, text)
    return out
