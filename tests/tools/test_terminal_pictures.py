"""A terminal picture shows one command of the tutorial with what it printed, and nothing of its neighbours."""

from __future__ import annotations

import pytest

from tools.drawings.colours import THEMES
from tools.drawings.terminal import SCENES, Scene, picture, shown

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
