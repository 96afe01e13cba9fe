"""The models that the other tests stand on are what they claim to be."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.data.columns import Columns
from nxm_export.data.examples import load_raw
from tests.support import tiny
from tests.support.variants import variants


@pytest.mark.parametrize("family", variants(tiny.FAMILIES, ("bert", "albert"), slow=tiny.DISTINCT))
def test_a_tiny_checkpoint_has_learned_its_task_and_keeps_its_plan(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = tiny_checkpoint(family)
    opened = open_checkpoint(checkpoint)
    opened.require_valid()
    assert opened.family.model_type == family
    assert opened.plan.pattern_counts == {"2:4+W8": tiny.matrices(family)}
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    # Chance is at most 0.65 (the larger class); 60 steps reach 0.9 and more with every seed tried.
    assert metrics["value"] > 0.75


def test_the_tokenizer_of_roberta_pads_with_its_own_id(tmp_path: Path) -> None:
    tiny.write_model("roberta", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert tiny.tokenizer("roberta").token_to_id("<pad>") == config["pad_token_id"] == 1


def test_data_of_pairs_and_scores_is_read_back(tmp_path: Path) -> None:
    train, _ = tiny.write_data(tmp_path, "regression", pairs=True)
    raw = load_raw(str(train), "train", Columns())
    assert raw.pairs is not None
    assert len(raw.texts) == tiny.TRAIN_SAMPLES
    assert {float(str(label)) for label in raw.labels} >= {-1.0, 1.0}


def test_the_suite_cannot_reach_the_network() -> None:
    with pytest.raises(OSError, match="without network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)  # an address reserved for documentation
    with pytest.raises(OSError, match="without network"):
        socket.getaddrinfo("example.com", 80)


def test_processes_started_by_tests_cannot_reach_the_network_either() -> None:
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "without network" in child.stderr


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
