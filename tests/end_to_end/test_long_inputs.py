"""Documents of thousands of tokens, from the checkpoint to the server, in memory that grows with their length alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from engines.serving.model import open_model
from engines.serving.settings import ModelOptions
from nxm_export.cli import main
from nxm_export.graph.exporter import export
from tests.support import tiny

POSITIONS, HEADS = 4096, 4
_PEAK = """
import resource, sys
import numpy as np
from engines.reference import pytorch

rows, length = map(int, sys.argv[2:])
with pytorch.load(sys.argv[1], task="classification", exact=True) as engine:
    def run(rows, length):
        ids = np.full((rows, length), 7)
        mask = np.ones_like(ids)
        mask[:, -3:] = 0
        engine.run({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = run(1, 16)
    print(run(rows, length) - before)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one small block that takes 4096 tokens."""
    import transformers

    out = tmp_path_factory.mktemp("long") / "model"
    config = transformers.BertConfig(
        vocab_size=len(tiny.WORDS) + 5,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        initializer_range=0.1,
        id2label={0: "0", 1: "1"},
        label2id={"0": 0, "1": 1},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(out)
    tiny.write_tokenizer("bert", out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": POSITIONS}))
    return out


def test_the_reference_holds_no_scores_of_a_whole_document(model: Path) -> None:
    """All scores of one row of 4096 tokens are 0.54 GB in float64, and attention would hold them twice."""
    taken = {}
    for rows, length in ((1, 2048), (1, 4096), (2, 4096)):
        child = subprocess.run(
            [sys.executable, "-c", _PEAK, str(model), str(rows), str(length)],
            capture_output=True,
            text=True,
            check=True,
        )
        taken[rows, length] = int(child.stdout)
    scores = 8 * HEADS * 4096**2
    assert taken[1, 4096] < scores / 2
    assert taken[2, 4096] < scores / 2
    # The part that grows is the mask: one byte for every pair of tokens.
    assert taken[2, 4096] - taken[1, 4096] < 4 * 4096**2


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_a_document_of_4096_tokens_is_exported_built_compared_predicted_and_served(
    model: Path, tmp_path: Path, backend: str
) -> None:
    words = random.Random(0)
    lines = [
        f"{' '.join(words.choices(tiny.WORDS, k=count))}\t{at % 2}" for at, count in enumerate((5000, 3000, 9, 30))
    ]
    data = tmp_path / "dev.tsv"
    data.write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    export(model, tmp_path / "graph")

    def nxm(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    engine = tmp_path / "engine"
    nxm("build", tmp_path / "graph", "--backend", backend, "--out", engine)
    (report,) = json.loads(nxm("compare", model, engine, f"--data={data}", "--json"))
    probes = {probe["name"]: probe["passed"] for probe in report["probes"]}
    assert report["passed"] is True
    assert set(probes.values()) == {True}
    answers = nxm("predict", engine, f"--data={data}", "--json")
    assert len(json.loads(answers)) == len(lines)
    served = open_model("m", "1", engine, ModelOptions(instances=1))
    assert (served.buckets.longest.length, served.buckets.longest.most) == (POSITIONS, 4)
    served.close()
