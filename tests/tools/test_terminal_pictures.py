"""A terminal picture shows one command of the tutorial with what it printed, and nothing of its neighbours."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tools.drawings.colours import THEMES
from tools.drawings.terminal import SCENES, Scene, picture, shown
from tools.tutorial import served

PAGE = """```sh
nxm show graph
nxm verify \\
  graph/model.onnx
nxm show graph
```

```text
a table

graph/model.onnx
  1 < 2

no problem found

graph/model.onnx
again
```
"""


def test_a_command_has_its_own_output() -> None:
    command, lines = shown(Scene("nxm verify", "graph/model.onnx"), PAGE)
    assert command == "nxm verify graph/model.onnx"
    assert lines == ["graph/model.onnx", "  1 < 2", "", "no problem found"]
    assert shown(Scene("nxm verify", "graph/model.onnx", until="no problem"), PAGE)[1] == lines[:2]


@pytest.mark.parametrize("scene", [Scene("nxm bench", "graph"), Scene("nxm verify", "Passed")])
def test_what_the_page_lacks_is_an_error(scene: Scene) -> None:
    with pytest.raises(LookupError, match=scene.command):
        shown(scene, PAGE)


def test_pictures_are_small_and_wide_enough_for_their_lines() -> None:
    for scene in SCENES.values():
        text = picture(scene, THEMES["light"])
        assert len(text) < 8000
        assert "<title" in text
        width = float(text.partition('width="')[2].partition('"')[0])
        lengths = [float(part.partition('"')[0]) for part in text.split('textLength="')[1:]]
        assert max(lengths) + 32 <= width + 1


SERVER = """
import sys, time
assert sys.stderr.isatty()
print("next: printf %s-%s answered   # once it listens", file=sys.stderr)
print("00:00:00  ready: seconds 0.1", file=sys.stderr, flush=True)
time.sleep(60)
"""


def test_a_server_is_shown_as_on_a_terminal_with_the_answer_to_the_request_that_it_proposes(tmp_path: Path) -> None:
    told = served([sys.executable, "-c", SERVER], tmp_path, os.environ).splitlines()
    assert told[:2] == ["next: printf %s-%s answered   # once it listens", "00:00:00  ready: seconds 0.1"]
    assert told[3] == "$ printf %s-%s answered"
    assert "answered" in told[-1]


def test_a_server_that_ends_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such engine"):
        served([sys.executable, "-c", "print('no such engine', flush=True)"], tmp_path, os.environ)
