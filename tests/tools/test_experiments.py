"""The ablations run to their end on a tiny model, and say what they compare."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressors.projections import nm_mask
from compressors.quantization.fake_quant import QuantLinear
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.data.columns import Columns
from nxm_export.data.label_kinds import load_labelled
from tests.support import onnx_text, tiny
from tools.experiments import (
    graph_forms,
    layerwise_ablation,
    long_document,
    mask_ablation,
    output_ablation,
    padding_share,
    polygraphy_peer,
    silver_tags,
    silver_tasks,
    training_precision,
    training_variants,
)
from tools.experiments.carried_duals import layer_duals


@pytest.mark.parametrize(
    ("tool", "more", "lines"),
    [
        (
            mask_ablation,
            ["--patterns", "2:4"],
            ["dense: accuracy ", "2:4: accuracy ", "2:4 activation, permuted: blocks: "],
        ),
        (
            layerwise_ablation,
            [
                *["--options", "2:4+W4", "--threads", "1", "--samples", "64", "--variants"],
                "admm, joint;admm, sequential, corrected;admm, in nested rounds;admm, half by gradients;"
                "obs-refit, biases corrected;admm, scales searched",
            ],
            [
                *["2:4+W4, admm, joint: KL ", "2:4+W4, admm, sequential, corrected: KL "],
                *["2:4+W4, admm, in nested rounds: KL ", "2:4+W4, admm, half by gradients: KL "],
                *["2:4+W4, obs-refit, biases corrected: KL ", "2:4+W4, admm, scales searched: KL "],
            ],
        ),
        (output_ablation, [], ["dense: MCC ", "all outputs: KL ", "no output: KL ", "on distorted sentences, "]),
    ],
    ids=["masks", "starts", "outputs"],
)
def test_an_ablation_runs_to_its_end(
    tool: ModuleType,
    more: list[str],
    lines: list[str],
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = tiny_checkpoint("bert").parent
    data = ["--train", str(made / "train.tsv"), "--dev", str(made / "dev.tsv"), "--max-length", "48"]
    monkeypatch.setattr(sys, "argv", ["ablation", str(made / "dense"), *data, *more])
    tool.main()
    shown = capsys.readouterr().out
    for line in lines:
        assert any(row.startswith(line) for row in shown.splitlines()), shown


def test_what_polygraphy_reads_is_set_beside_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("polygraphy", reason="comparing with polygraphy needs the extra `trt-rtx`")
    text = """g (float[b, 4] x) => (float[b, 2] y, float[b, 2] z)
        <float[4, 2] w = {1,1, 1,1, 0,0, 0,0}, float[4, 4] v = {1,1,1,1, 1,1,1,1, 1,1,1,1, 1,1,1,1}>
        { [one] y = MatMul(x, w) a, b = Split <axis = 1, num_outputs = 2>(v) [two] z = MatMul(x, b) }"""
    file = onnx_text.save(text, tmp_path / "model.onnx")
    assert polygraphy_peer.main([str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["| model | w: 2:4 | w (one): 2:4, v (two): dense | none |"]


def test_steps_in_both_precisions_are_timed_in_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model", "tiny", "--lengths", "16", "--rounds", "6", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["training_precision", *more])
    training_precision.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.partition(":")[0] for line in lines] == ["plain, 32 x 16", "qat with teacher, 32 x 16"]


class OneLayer(nn.Module):
    """A model of one linear layer, which reads x (batch, sequence, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        output: Tensor = self.linear(x)
        return output


def test_the_dual_of_a_layer_is_the_gradient_of_its_output_error_outside_the_mask() -> None:
    torch.manual_seed(0)
    dense, x = OneLayer(), torch.randn(2, 5, 8)
    mask = nm_mask(torch.rand(4, 8), NMPattern(2, 4))
    refit = torch.randn(4, 8) * mask
    layer = QuantLinear(nn.Linear(8, 4), WeightSpec.parse("2:4+W4"), "linear.weight")
    layer.start_from(refit, mask, None)
    batch = {"x": x, "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    dual = layer_duals(dense, {"linear.weight": layer}, [batch])["linear.weight"]
    weight = refit.clone().requires_grad_()
    error = ((weight - dense.linear.weight.detach()) @ x.flatten(0, 1).T).square().sum(dim=0).mean()
    (gradient,) = torch.autograd.grad(error, weight)
    torch.testing.assert_close(dual, gradient * ~mask)


@pytest.mark.slow
def test_every_way_to_train_runs_to_its_end(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny_checkpoint("bert").parent
    names = ("default", "rounds", "free masks", "carried duals", "distorted, 2e-4")
    data = ["--train", str(made / "train.tsv"), "--dev", str(made / "dev.tsv"), "--max-length", "48"]
    more = ["--steps", "8", "--epochs", "2", "--threads", "1", "--variants", ";".join(names)]
    monkeypatch.setattr(sys, "argv", ["ablation", str(made / "dense"), *data, *more])
    training_variants.main()
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if not line.startswith("kept weights that moved: ")]
    free, carried = (line.rpartition(" ")[2] for line in printed if line not in lines)  # ways whose masks move
    assert (free, carried != "0.000") == ("0.000", True), "the mean cosine of the duals that pull"
    assert [line.partition(": distance ")[0] for line in lines] == [
        "dense",
        *(
            f"2:4+W4, {name}{average}"
            for name in names
            for average in ("", *(f", average of {decay}" for decay in training_variants.DECAYS))
        ),
    ]
    assert lines[0].startswith("dense: distance 0.0000, agreement 100.0, ")
    assert len({line.partition(": ")[2] for line in lines}) > 3  # they are not one run


@pytest.mark.slow
def test_a_model_without_a_head_is_trained_before_it_is_varied(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoder = tiny_checkpoint("bert").parent / "dense"
    train, dev = tiny.write_data(tmp_path, "regression")
    data = ["--train", str(train), "--dev", str(dev), "--max-length", "48"]
    more = ["--task", "regression", "--dense-steps", "2", "--steps", "2", "--threads", "1", "--variants", "default"]
    monkeypatch.setattr(sys, "argv", ["ablation", str(encoder), *data, *more])
    training_variants.main()
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("dense: distance 0.0000, ")
    assert len(others) == 1 + len(training_variants.DECAYS)


@pytest.mark.exhaustive
def test_a_long_document_goes_through_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """Eleven processes: minutes. What they do is tested in tests/end_to_end/test_long_inputs.py."""
    long_document.main(["--smoke"])
    found = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in found["stages"]][:4] == ["make the model", "compress", "export", "ort: build"]
    assert {entry["backend"]: entry["passed"] for entry in found["compared"]} == {"ort": True, "openvino": True}
    assert all(0.05 < stage["peak_gb"] < 8 for stage in found["stages"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["query-key-value", "affine", "context", "one-table"])
def test_forms_of_a_graph_that_should_change_nothing_change_no_answer(
    form: str, tiny_graph: Callable[..., Path], tmp_path: Path
) -> None:
    graph = tiny_graph("bert", "inputs") / "model.onnx"
    ids = np.arange(5, 29).reshape(3, 8)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    plain = onnx_text.run(graph, feeds)["logits"]
    written = graph_forms.write_form(graph, form, "openvino", tmp_path / "form.onnx")
    assert written.read_bytes() != graph.read_bytes()
    # A code that moves by one step changes these logits by some 0.05.
    np.testing.assert_allclose(onnx_text.run(written, feeds)["logits"], plain, atol=0.1)


@pytest.mark.slow
def test_all_forms_are_timed_against_the_graph_as_it_is(
    tiny_graph: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    graph = str(tiny_graph("bert", "inputs") / "model.onnx")
    graph_forms.main([graph, "--runtime", "ort", "--shapes", "1x8", "--seconds", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[7:23].strip() for line in lines] == [
        *("as it is", "as it is, again"),
        *graph_forms.FORMS,
        graph_forms.LAST,
    ]
    assert " 1.000 (1.000 to 1.000)" in lines[0]


def test_padding_is_the_share_of_tokens_beyond_the_samples_own() -> None:
    lengths = np.array([1, 3] * 32)
    in_pairs, sorted_by_length = list(range(64)), [*range(0, 64, 2), *range(1, 64, 2)]
    assert padding_share.padding(lengths, in_pairs) == pytest.approx(1 - 128 / 192)
    assert padding_share.padding(lengths, sorted_by_length) == 0.0


def test_silver_answers_stand_where_they_are_said_to() -> None:
    tokens = ["He", "left", "New", "York", "for", "France", ",", "then", "Texas", "."]
    known = {("New", "York"): "STATE", ("France",): "COUNTRY", ("Texas",): "STATE"}
    row = silver_tags.tagged(" ".join(tokens), known)
    found = [dict(entry) for entry in silver_tasks.asked([row, {"tokens": ["No"], "tags": ["O"]}])]
    assert [entry["question"] for entry in found] == ["Which country is named?", "Which state is named?"]
    for entry, expected in zip(found, ("France", "New York"), strict=True):
        answers, context = entry["answers"], entry["context"]
        assert isinstance(answers, dict)
        assert isinstance(context, str)
        assert answers["text"] == [expected]
        assert context[answers["answer_start"][0] :].startswith(expected)
    assert [dict(entry)["labels"] for entry in silver_tasks.labelled([row])] == [["COUNTRY", "STATE"]]


def test_a_silver_query_has_one_document_that_answers_it(tmp_path: Path) -> None:
    pairs = [(f"question {number}", f"sentence {number}", str(number % 2)) for number in range(8)]
    found = [dict(entry) for entry in silver_tasks.candidates(pairs, random.Random(0))]
    assert {entry["query"] for entry in found} == {f"question {number}" for number in (0, 2, 4, 6)}
    for number in (0, 2, 4, 6):
        mine = [entry for entry in found if entry["query"] == f"question {number}"]
        assert [entry["document"] for entry in mine if entry["relevance"]] == [f"sentence {number}"]
        assert len({entry["document"] for entry in mine}) == len(mine)
    share = [dict(entry) for entry in silver_tasks.overlaps([("What is it?", "it is red", "0")])]
    assert share == [{"text": "What is it?", "text_pair": "it is red", "score": 0.6667}]
    for rows, task in ((found, "reranking"), (share, "regression")):
        file = tmp_path / f"{task}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs_of = load_labelled(str(file), "train", Columns(), TASKS[task]).pairs
        assert pairs_of is not None, "the second text is read"
        assert all(pairs_of)
