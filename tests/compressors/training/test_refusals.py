"""What training refuses, and what it then leaves: nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.bert.modeling_bert import BertIntermediate

from compressors.settings import Settings
from compressors.training.compress import compress, finetune
from nxm_export.contract.records.checkpoint_metrics import read_metrics
from nxm_export.data.columns import Columns
from nxm_export.errors import ArtifactError, DataError, Notice, PlanError
from tests.support.trained import FAST, plan_for, run


def test_training_still_wants_labels(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.tsv").write_text("sentence\nfine film\ndull film\n")
    with pytest.raises(DataError, match="label"):
        compress(
            prepared / "dense",
            task="classification",
            train=str(tmp_path / "texts.tsv"),
            dev=str(prepared / "dev.tsv"),
            plan=plan_for(prepared / "dense", "2:4+W4"),
            out=tmp_path / "out",
            settings=Settings(**{**FAST, "steps": 2}),
        )


@pytest.mark.parametrize(("recipe", "copies"), [("admm", 1), ("obs-refit", 1), ("admm", 1000)])
def test_too_little_text_to_calibrate_on_is_refused_with_how_much_is_needed(
    prepared: Path, tmp_path: Path, recipe: str, copies: int
) -> None:
    header, first, *_ = (prepared / "train.tsv").read_text().splitlines()
    (tmp_path / "few.tsv").write_text(f"{header}\n" + f"{first}\n" * copies)
    said = r"the calibration texts have \d+ tokens, .* give about \d+ different texts .* \(different ones read: 1\)"
    with pytest.raises(DataError, match=said):
        compress(
            prepared / "dense",
            task="classification",
            train=str(tmp_path / "few.tsv"),
            dev=str(prepared / "dev.tsv"),
            plan=plan_for(prepared / "dense", "2:4+W4"),
            out=tmp_path / "out",
            settings=Settings(**{**FAST, "steps": 0, "recipe": recipe}),
            progress=lambda what, *_: pytest.fail(f"{what} was begun"),
        )
    assert [file.name for file in tmp_path.iterdir()] == ["few.tsv"]


def test_a_directory_without_a_name_and_a_limit_of_no_samples_are_refused(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {
        "task": "classification",
        "train": str(prepared / "train.tsv"),
        "dev": str(prepared / "dev.tsv"),
    }
    with pytest.raises(ArtifactError, match="would be replaced as a whole; name a new directory"):
        finetune(prepared / "dense", out=".", **given)
    for limit in (0, -3):
        with pytest.raises(DataError, match=f"train limit is a number of samples, at least 1; got {limit}"):
            finetune(prepared / "dense", out="new", train_limit=limit, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["nxm", "sr-ste", "paper"])
def test_recipes_that_find_masks_in_training_need_steps(recipe: str) -> None:
    with pytest.raises(PlanError, match="finds its masks in training"):
        Settings(recipe=recipe, steps=0)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_nothing(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the loss is (nan|inf) at step \d+ of phase"):
        run(prepared, tmp_path / "checkpoint", learning_rate=1e20, steps=40)
    assert not (tmp_path / "checkpoint").exists()


def test_a_model_without_the_head_is_refused_with_the_way_out(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no classification head; fine-tune it first"):
        compress(
            prepared / "encoder",
            task="classification",
            train=str(prepared / "train.tsv"),
            dev=str(prepared / "dev.tsv"),
            plan=plan_for(prepared / "dense"),
            out=tmp_path / "x",
        )


def test_settings_refuse_nonsense() -> None:
    with pytest.raises(PlanError, match="unknown recipe"):
        Settings(recipe="asp")
    with pytest.raises(PlanError, match="give --recipe nxm"):
        Settings(admm="joint")
    with pytest.raises(PlanError, match="scores weights itself"):
        Settings(mask_scores="activation")
    with pytest.raises(PlanError, match="leave --train-embeddings out"):
        Settings(recipe="paper", freeze_embeddings=False)
    for untaught in ({"distill": False}, {"recipe": "paper"}):
        with pytest.raises(DataError, match="nothing is distilled; leave --augment out"):
            Settings(augment=0.5, **untaught)
    with pytest.raises(DataError, match="percentile"):
        Settings(percentile=0.0)
    with pytest.raises(DataError, match="at least 1"):
        Settings(batch_size=0)


@pytest.mark.parametrize("out", ["dense", "dense/inside", ".", "link", "dense/../dense"])
def test_a_source_is_never_replaced(prepared: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "link").symlink_to(prepared / "dense")
    target = tmp_path / "link" if out == "link" else prepared / out
    before = (prepared / "dense" / "model.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match="choose another --out"):
        run(prepared, target, steps=4)
    assert (prepared / "dense" / "model.safetensors").read_bytes() == before
    assert not (prepared / "dense" / "inside").exists()


def test_numbers_that_the_head_counts_otherwise_are_refused_and_a_map_states_them(
    prepared: Path, tmp_path: Path
) -> None:
    """A head that has learned 0 as `bad` and 1 as `good`, with its names the other way round."""

    def evaluated(columns: Columns) -> float | None:
        metrics = finetune(
            tmp_path / "model",
            task="classification",
            train=str(prepared / "train.tsv"),
            dev=str(prepared / "dev.tsv"),
            out=tmp_path / "out",
            columns=columns,
        )
        return metrics.value

    shutil.copytree(prepared / "dense", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    file = tmp_path / "model" / "model.safetensors"
    config |= {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    swapped = {name: tensor.flip(0) if name.startswith("classifier.") else tensor for name, tensor in weights.items()}
    save_file({name: tensor.contiguous() for name, tensor in swapped.items()}, file, {"format": "pt"})
    refused = pytest.raises(DataError, match=r"fewer than by guessing: .* --label-map 0=NAME")
    with pytest.warns(Notice, match="0 is 'good', 1 is 'bad'"), refused:
        evaluated(Columns())
    data: dict[str, Any] = {
        "train": str(prepared / "train.tsv"),
        "dev": str(prepared / "dev.tsv"),
        "task": "classification",
    }
    plan, refused = plan_for(tmp_path / "model"), pytest.raises(DataError, match="fewer than by guessing")
    with pytest.warns(Notice), refused:
        compress(tmp_path / "model", plan=plan, out=tmp_path / "compressed", **data)
    assert not (tmp_path / "compressed").exists()
    assert evaluated(Columns(label_map={"0": "bad", "1": "good"})) == read_metrics(prepared / "dense").value


def broken(dense: Path, out: Path, weight: str) -> Path:
    """A dense model with a NaN in a weight."""
    shutil.copytree(dense, out)
    weights = {name: tensor.clone() for name, tensor in load_file(out / "model.safetensors").items()}
    weights[weight].view(-1)[0] = float("nan")
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def compressed(prepared: Path, dense: Path, out: Path, **settings: Any) -> None:
    compress(
        dense,
        task="classification",
        train=str(prepared / "train.tsv"),
        dev=str(prepared / "dev.tsv"),
        plan=plan_for(prepared / "dense", "2:4+W8"),
        out=out,
        settings=Settings(**{**FAST, "steps": 0, **settings}),
    )


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (
            "bert.encoder.layer.1.attention.self.query.weight",
            r"layer\.1\.attention\.self\.query\.weight: calibration saw",
        ),
        ("bert.encoder.layer.0.output.dense.bias", r"layer\.0\.output\.dense\.weight: calibration saw a NaN"),
        ("bert.encoder.layer.1.output.LayerNorm.weight", "answers to training samples is NaN or infinite"),
        ("classifier.bias", "answers to training samples is NaN or infinite; the model is broken before compression"),
    ],
)
def test_a_model_with_a_nan_is_refused_with_where_it_shows(
    prepared: Path, tmp_path: Path, weight: str, said: str
) -> None:
    model = broken(prepared / "dense", tmp_path / "model", weight)
    with pytest.raises(DataError, match=said):
        compressed(prepared, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["admm", "obs", "magnitude", "one-shot"])
def test_a_checkpoint_that_answers_nan_is_never_saved(prepared: Path, tmp_path: Path, recipe: str) -> None:
    """Where no output is INT8 and nothing trains, no step before the score looks at answers."""
    model = broken(prepared / "dense", tmp_path / "model", "classifier.bias")
    with pytest.raises(DataError, match=r"answers to 64 of 64 dev samples are NaN .* so nothing is saved"):
        compressed(prepared, model, tmp_path / "out", recipe=recipe, output_limit=None)
    with pytest.raises(DataError, match=r"answers to 64 of 64 dev samples are NaN"):
        finetune(
            model,
            task="classification",
            train=str(prepared / "train.tsv"),
            dev=str(prepared / "dev.tsv"),
            out=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["admm", "magnitude"])
def test_a_layer_that_no_text_reaches_is_named_with_the_way_out(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    def without_its_layer(self: BertIntermediate, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape[:-1], self.dense.out_features)

    monkeypatch.setattr(BertIntermediate, "forward", without_its_layer)
    silent = "bert.encoder.layer.0.intermediate.dense.weight"
    with pytest.raises(DataError, match=f"{silent} never runs .* --keep-dense '{silent}'"):
        compressed(prepared, prepared / "dense", tmp_path / "out", recipe=recipe)
    assert not (tmp_path / "out").exists()
