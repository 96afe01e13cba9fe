"""What doctor, verify and inspect print of a graph with no matrix, with an unread one, and with both kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from nxm_export.cli import main
from nxm_export.graph.reading.graph_weights import save_graph
from tests.support import onnx_text

BODIES = {
    "none": ("", "{ y = Identity(x) }", "0 products, 0 read, 0 sparse"),
    "unread": ("float[2,2] w = {1, 0, 0, 1}", "{ [p] y = plugin.Dense(x, w) }", "1 products, 0 read, 0 sparse"),
    "read": ("float[2,2] w = {1, 0, 0, 1}", "{ y = MatMul(x, w) }", "1 products, 1 read, 0 sparse"),
}


@pytest.mark.parametrize("more", [[], ["--all"]])
@pytest.mark.parametrize("command", ["doctor", "verify", "inspect"])
@pytest.mark.parametrize("kind", BODIES)
def test_any_number_of_matrices_is_counted(kind: str, command: str, more: list[str], tmp_path: Path) -> None:
    initializers, body, counts = BODIES[kind]
    file = tmp_path / "model.onnx"
    save_graph(onnx_text.model(f"g (float[b, 2] x) => (float[b, 2] y) <{initializers}> {body}"), file)
    done = CliRunner().invoke(main, [command, str(file), *more])
    assert done.exit_code == 0, (done.output, done.exception)
    if command != "inspect":  # which lists what is in a graph, not what can run sparse
        assert counts in done.output
        assert ("not read: " in done.output) == (kind == "unread")
