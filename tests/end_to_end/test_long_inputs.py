"""Documents of thousands of tokens, from the checkpoint to the server, in memory that grows with their length alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import nxm_export
from engines.ort import backend as ort
from engines.passport import load_passport
from engines.serving.model import open_model
from engines.serving.settings import ModelOptions
from nxm_export.cli import main
from nxm_export.data.predictions import Prediction
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_builds import build_engine
from tests.support import baked, tiny

POSITIONS, HEADS = 4096, 4
TOKENS, WINDOW = 8192, 128  # of ModernBERT as published
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
    (report,) = json.loads(nxm("compare", engine, f"--checkpoint={model}", f"--data={data}", "--json"))
    probes = {probe["name"]: probe["passed"] for probe in report["probes"]}
    assert report["passed"] is True
    assert set(probes.values()) == {True}
    answers = nxm("predict", engine, f"--data={data}", "--json")
    assert len(json.loads(answers)) == len(lines)
    served = open_model("m", "1", engine, ModelOptions(instances=1))
    assert (served.buckets.longest.length, served.buckets.longest.most) == (POSITIONS, 4)
    served.close()


def test_a_window_of_modernbert_is_exact_in_a_document_of_8192_tokens(tmp_path: Path) -> None:
    """Two blocks that read 64 tokens to either side: a token moves the outputs of the 128 beside it, and no other bit.

    And those that it moves are those of transformers.
    """
    import torch
    import transformers

    tiny.write_model(
        "modernbert",
        tmp_path / "model",
        head="token-classification",
        options={
            "max_position_embeddings": TOKENS,
            "local_attention": WINDOW,
            "layer_types": ["sliding_attention"] * tiny.LAYERS,
            "num_attention_heads": 2,
        },
    )
    settings = tmp_path / "model/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": TOKENS}))
    export(tmp_path / "model", tmp_path / "graph")
    build_engine(tmp_path / "graph", tmp_path / "engine", "ort")
    at, reach = 5000, tiny.LAYERS * WINDOW // 2
    ids = np.random.default_rng(0).integers(5, len(tiny.WORDS) + 5, (1, TOKENS))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds["attention_mask"][:, -1000:] = 0
    with ort.load(tmp_path / "engine") as engine:
        before = engine.run(feeds)["logits"][0]
        other = {**feeds, "input_ids": np.where(np.arange(TOKENS) == at, (ids - 4) % 30 + 5, ids)}
        after = engine.run(other)["logits"][0]
    read = slice(0, TOKENS - 1000)  # what is padding may read anything
    changed = np.flatnonzero((after[read] != before[read]).any(-1))
    assert load_passport(tmp_path / "engine").options["rotary_attention"] == tiny.LAYERS
    assert (changed.min(), changed.max()) == (at - reach, at + reach)
    theirs: Any = transformers.AutoModelForTokenClassification
    model = theirs.from_pretrained(tmp_path / "model", attn_implementation="sdpa").train(False)
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits[0].numpy()
    np.testing.assert_allclose(before[read], expected[read], atol=1e-4)


def test_a_modernbert_of_8192_tokens_goes_through_every_stage(tmp_path: Path) -> None:
    """The mean of the tokens is its head, as in the published configuration."""
    options = {
        "max_position_embeddings": TOKENS,
        "local_attention": WINDOW,
        "classifier_pooling": "mean",
        "layer_types": ["sliding_attention"],
        "num_attention_heads": 2,
    }
    checkpoint = baked.write_checkpoint("modernbert", tmp_path / "model", layers=1, placement="inputs", options=options)
    settings = checkpoint / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": TOKENS}))
    words = random.Random(0)
    data = tmp_path / "dev.tsv"
    data.write_text("sentence\tlabel\n" + f"{' '.join(words.choices(tiny.WORDS, k=9000))}\t1\n")
    export(checkpoint, tmp_path / "graph")
    build_engine(tmp_path / "graph", tmp_path / "engine", "ort")
    report = nxm_export.compare(tmp_path / "engine", data)
    report.require()
    [answer] = nxm_export.predict(tmp_path / "engine", [data.read_text().splitlines()[1].partition("\t")[0]])
    assert isinstance(answer, Prediction)
    served = open_model("m", "1", tmp_path / "engine", ModelOptions(instances=1))
    assert served.buckets.longest.length == TOKENS
    served.close()
