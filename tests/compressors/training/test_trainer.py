"""Training phases: recipes, invariants, and a run that is killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressors.models import load_tokenizer, resolve
from compressors.pruning.layer_inputs import second_moments
from compressors.pruning.layerwise import ADMM, OutputMetric
from compressors.quantization.fake_quant import quant_linears
from compressors.settings import Settings
from compressors.training.compress import compress, finetune
from compressors.training.phases import Job
from compressors.training.task_data import TaskDataRequest, read_task_data
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics, read_metrics
from nxm_export.contract.tasks import task_named
from nxm_export.data.columns import Columns
from nxm_export.errors import ArtifactError, DataError, Notice, PlanError
from nxm_export.progress import Progress
from tests.support import tiny
from tests.support.variants import variants

FAST: dict[str, Any] = {
    "batch_size": 16,
    "learning_rate": 2e-3,
    "dense_learning_rate": 3e-3,
    "dense_steps": 60,
    "calibration_samples": 64,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data and a fine-tuned dense model."""
    out = tmp_path_factory.mktemp("prepared")
    tiny.write_model("bert", out / "encoder")
    train, dev = tiny.write_data(out)
    finetune(
        out / "encoder",
        task="classification",
        train=str(train),
        dev=str(dev),
        out=out / "dense",
        settings=Settings(**FAST),
    )
    return out


def plan_for(dense: Path, spec: str = "2:4+W8") -> CompressionPlan:
    source = resolve(dense)
    return source.family.uniform_plan(source.config, WeightSpec.parse(spec))


def run(
    prepared: Path,
    out: Path,
    spec: str = "2:4+W8",
    progress: Progress = lambda what, done, total: None,
    **settings: Any,
) -> CompressionMetrics:
    return compress(
        prepared / "dense",
        task="classification",
        train=str(prepared / "train.tsv"),
        dev=str(prepared / "dev.tsv"),
        plan=plan_for(prepared / "dense", spec),
        out=out,
        settings=Settings(**{**FAST, "steps": 20, **settings}),
        progress=progress,
    )


def test_dense_model_learns_and_keeps_its_metrics(prepared: Path) -> None:
    metrics = read_metrics(prepared / "dense")
    assert metrics.value is not None
    assert metrics.interval is not None
    low, high = metrics.interval
    assert metrics.value > 0.85
    assert low <= metrics.value <= high
    assert metrics.dev_samples == tiny.DEV_SAMPLES


def test_a_model_whose_head_fits_is_not_trained_again(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / ".kept.work").mkdir()
    (tmp_path / ".kept.work" / "train_log.jsonl").write_text('{"phase": "dense", "step": 7, "loss": 0.5}\n')
    metrics = finetune(
        prepared / "dense",
        task="classification",
        train=str(prepared / "train.tsv"),
        dev=str(prepared / "dev.tsv"),
        out=tmp_path / "kept",
        settings=Settings(**FAST),
    )
    assert metrics.steps == 0
    assert not (tmp_path / "kept" / "train_log.jsonl").exists(), "nor has it the log of what was trained there before"
    assert metrics.value == read_metrics(prepared / "dense").value


@pytest.mark.parametrize(
    "recipe",
    variants(["obs", "admm", "obs-refit", "nxm", "magnitude", "sr-ste", "one-shot", "paper"], ("nxm", "paper")),
)
def test_every_recipe_gives_a_valid_checkpoint_and_logs_what_it_did(
    prepared: Path, tmp_path: Path, recipe: str
) -> None:
    metrics = run(prepared, tmp_path / "checkpoint", recipe=recipe, steps=60, learning_rate=5e-3)
    open_checkpoint(tmp_path / "checkpoint").require_valid()
    log = tmp_path / "checkpoint" / "train_log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    phases = {line["phase"] for line in lines}
    if recipe == "nxm":
        assert {"admm", "qat"} <= phases
        assert (metrics.admm_steps or 0) + metrics.qat_steps == 60
        updates = [line for line in lines if "residual" in line]
        assert {"residual", "flips", "projected_loss"} <= set(updates[0])
        assert metrics.residual is not None
        assert metrics.residual < updates[0]["residual"]
    elif recipe in ("magnitude", "obs", "admm", "obs-refit"):
        assert phases == {"qat"}
    elif recipe == "sr-ste":
        assert phases == {"sr-ste", "qat"}
        assert (metrics.sr_ste_steps, metrics.qat_steps) == (48, 12)
    elif recipe == "one-shot":
        assert not phases
        assert (metrics.steps, metrics.qat_steps) == (0, 0)
    else:
        assert phases == {"admm"}
        assert metrics.qat_steps == 0


def test_the_second_order_recipe_keeps_other_weights_than_magnitude(prepared: Path, tmp_path: Path) -> None:
    one, other = (run(prepared, tmp_path / recipe, recipe=recipe, steps=1).mask_hash for recipe in ("obs", "magnitude"))
    assert one != other


@pytest.mark.parametrize("spec", variants(["2:4+W4", "W4", "1:4"], ("2:4+W4",)))
def test_without_steps_the_solution_itself_is_what_is_saved(prepared: Path, tmp_path: Path, spec: str) -> None:
    metrics = run(prepared, tmp_path / "checkpoint", spec, recipe="admm", steps=0)
    assert (metrics.steps, metrics.qat_steps) == (0, 0)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    checkpoint.require_valid()
    source = resolve(prepared / "dense")
    data = read_task_data(
        source,
        TaskDataRequest(task_named("classification"), str(prepared / "train.tsv")),
        load_tokenizer(source),
        Settings(**FAST),
    )
    settings = Settings(**{**FAST, "steps": 0, "recipe": "admm"})
    job = Job(source, data, plan_for(prepared / "dense", spec), settings, tmp_path / "work", lambda *_: None)
    student = job.prepared()
    layers = quant_linears(student)
    for layer in layers.values():
        layer.quantize_weight = False  # inputs are those that no rounded weight has changed
    hessians = second_moments(student, layers, job.calibration_batches())
    for name, layer in layers.items():
        expected = ADMM(layer.weight, OutputMetric(hessians[name]), layer.spec).weight
        saved = torch.from_numpy(checkpoint.weight(name).copy())
        # A pattern without bits is stored in 16 bit; scales are kept as logarithms in float32.
        torch.testing.assert_close(saved, expected.detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("recipe", ["admm", "magnitude"])
def test_without_steps_text_alone_is_enough_and_gives_the_same_weights(
    prepared: Path, tmp_path: Path, recipe: str
) -> None:
    rows = [line.split("\t") for line in (prepared / "train.tsv").read_text().splitlines()]
    text = rows[0].index("sentence")
    (tmp_path / "texts.tsv").write_text("".join(f"{row[text]}\n" for row in rows))
    for name, train in (("labelled", prepared / "train.tsv"), ("alone", tmp_path / "texts.tsv")):
        settings = Settings(**{**FAST, "steps": 0, "recipe": recipe})
        compress(
            prepared / "dense",
            task="classification",
            train=str(train),
            dev=str(prepared / "dev.tsv"),
            plan=plan_for(prepared / "dense", "2:4+W4"),
            out=tmp_path / name,
            settings=settings,
        )
    one, other = (open_checkpoint(tmp_path / name) for name in ("labelled", "alone"))
    for name in one.plan.weights:
        assert np.array_equal(one.weight(name), other.weight(name)), name
    assert read_metrics(tmp_path / "labelled").value == read_metrics(tmp_path / "alone").value


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


def test_too_little_text_to_calibrate_on_is_refused_with_how_much_is_needed(prepared: Path, tmp_path: Path) -> None:
    header, first, *_ = (prepared / "train.tsv").read_text().splitlines()
    (tmp_path / "few.tsv").write_text(f"{header}\n{first}\n")
    with pytest.raises(DataError, match=r"the calibration texts have \d+ tokens, .* give about \d+ texts like these"):
        compress(
            prepared / "dense",
            task="classification",
            train=str(tmp_path / "few.tsv"),
            dev=str(prepared / "dev.tsv"),
            plan=plan_for(prepared / "dense", "2:4+W4"),
            out=tmp_path / "out",
            settings=Settings(**{**FAST, "steps": 0, "recipe": "admm"}),
        )
    assert not (tmp_path / "out").exists()


def test_short_texts_are_calibrated_on_until_there_are_enough_tokens(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "short.tsv").write_text("sentence\tlabel\n" + "good\t1\nbad\t0\n" * 40)
    source = resolve(prepared / "dense")
    request = TaskDataRequest(task_named("classification"), str(tmp_path / "short.tsv"))
    settings = Settings(**{**FAST, "calibration_samples": 8})
    data = read_task_data(source, request, load_tokenizer(source), settings)
    job = Job(source, data, plan_for(prepared / "dense"), settings, tmp_path / "work", lambda *_: None)

    def tokens(wanted: int) -> int:
        return sum(int(batch["attention_mask"].sum()) for batch in job.calibration_batches(wanted))

    # three tokens a text
    assert [tokens(0), tokens(24), tokens(25), tokens(64), tokens(10**6)] == [24, 24, 27, 66, 3 * len(job.train)]


def test_a_single_group_is_trained_on_and_none_is_held_out(tmp_path: Path) -> None:
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="reranking"))
    train, _ = tiny.write_data(tmp_path, "reranking")
    header, *rows = train.read_text().splitlines()
    (tmp_path / "one.tsv").write_text(
        "\n".join([header, *("film\t" + row.split("\t", 1)[1] for row in rows[:40])]) + "\n"
    )
    data = read_task_data(
        source, TaskDataRequest(task_named("reranking"), str(tmp_path / "one.tsv")), load_tokenizer(source), Settings()
    )
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("W8"))
    job = Job(source, data, plan, Settings(), tmp_path / "work", lambda *_: None)
    assert (len(job.train), len(job.held_out)) == (40, 0)


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


@pytest.mark.parametrize("recipe", ["admm", "obs"])
def test_a_plan_that_leaves_all_dense_is_followed(prepared: Path, tmp_path: Path, recipe: str) -> None:
    plan = plan_for(prepared / "dense", "W8")
    compress(
        prepared / "dense",
        task="classification",
        train=str(prepared / "train.tsv"),
        dev=str(prepared / "dev.tsv"),
        plan=replace(plan, weights=dict.fromkeys(plan.weights, WeightSpec())),
        out=tmp_path / "out",
        settings=Settings(**{**FAST, "steps": 0, "recipe": recipe}),
    )
    open_checkpoint(tmp_path / "out").require_valid()


@pytest.mark.parametrize("recipe", ["nxm", "sr-ste", "paper"])
def test_recipes_that_find_masks_in_training_need_steps(recipe: str) -> None:
    with pytest.raises(PlanError, match="finds its masks in training"):
        Settings(recipe=recipe, steps=0)


@pytest.mark.parametrize("mode", variants(["mask", "joint", "joint-ste"], ("mask", "joint-ste")))
@pytest.mark.parametrize("spec", variants(["2:4+W4", "1:4+W8", "W4", "2:4"], ("2:4+W4",)))
def test_every_admm_mode_takes_every_kind_of_plan(prepared: Path, tmp_path: Path, mode: str, spec: str) -> None:
    run(prepared, tmp_path / "checkpoint", spec, recipe="nxm", admm=mode, steps=6)
    open_checkpoint(tmp_path / "checkpoint").require_valid()


def test_compression_keeps_the_accuracy_of_an_easy_task(prepared: Path, tmp_path: Path) -> None:
    metrics = run(prepared, tmp_path / "checkpoint", "2:4+W4", steps=60)
    dense = read_metrics(prepared / "dense").value
    # The classes are separated by single words; one sample of the dev set is 0.016.
    assert metrics.value is not None
    assert dense is not None
    assert metrics.value >= dense - 0.05


def test_baked_weights_load_with_plain_transformers(prepared: Path, tmp_path: Path) -> None:
    import transformers

    run(prepared, tmp_path / "checkpoint", steps=4)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint")
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    for name in checkpoint.plan.weights:
        loaded = model.get_parameter(name).detach().numpy()
        assert np.array_equal(loaded, checkpoint.weight(name))
        assert ((loaded != 0).reshape(-1, 4).sum(axis=-1) <= 2).all()


@pytest.mark.slow
def test_what_a_run_with_another_plan_left_behind_is_not_used(prepared: Path, tmp_path: Path) -> None:
    def interrupted(phase: str, done: int, steps: int) -> None:
        if phase == "qat":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(prepared, tmp_path / "checkpoint", "1:4+W8", recipe="nxm", progress=interrupted)
    assert list((tmp_path / ".checkpoint.work").glob("admm*.safetensors"))  # a finished phase, of the other plan
    metrics = run(prepared, tmp_path / "checkpoint", "2:4+W8", recipe="nxm")
    assert metrics.mask_hash == run(prepared, tmp_path / "alone", "2:4+W8", recipe="nxm").mask_hash


SCRIPT = """
import json, sys
from compressors.training.compress import compress
from compressors.settings import Settings
from compressors.models import resolve
from nxm_export.contract.plan import WeightSpec

prepared, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
source = resolve(prepared + "/dense")
metrics = compress(
    prepared + "/dense", task="classification", train=prepared + "/train.tsv", dev=prepared + "/dev.tsv",
    plan=source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W4")), out=out, settings=Settings(**settings),
    progress=lambda what, done, total: print(what, done, flush=True),
)
print(json.dumps(metrics.to_dict()))
"""


def start(prepared: Path, out: Path) -> subprocess.Popen[str]:
    settings = {**FAST, "recipe": "nxm", "steps": 60, "batch_size": 8, "dual_updates": 6}
    command = [sys.executable, "-c", SCRIPT, str(prepared), str(out), json.dumps(settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


@pytest.fixture(scope="module")
def whole(prepared: Path) -> tuple[Path, dict[str, object]]:
    """(checkpoint, metrics) of an uninterrupted run."""
    stdout, stderr = start(prepared, prepared / "whole").communicate(timeout=300)
    assert stdout.strip(), stderr
    return prepared / "whole", json.loads(stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["admm 15", "qat 20"])
def test_killed_and_resumed_gives_what_an_uninterrupted_run_gives(
    prepared: Path, whole: tuple[Path, dict[str, object]], tmp_path: Path, moment: str
) -> None:
    child = start(prepared, tmp_path / "killed")
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == moment:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / ".killed.work").is_dir()

    again = start(prepared, tmp_path / "killed")
    stdout, stderr = again.communicate(timeout=300)
    assert again.returncode == 0, stderr
    first = next(line for line in stdout.splitlines() if line.startswith(moment.split()[0]))
    assert int(first.split()[1]) > 0  # it went on, it did not start again
    assert not [line for line in stdout.splitlines() if line.startswith(("calibrate", "outputs"))]  # nor measured again
    resumed = json.loads(stdout.splitlines()[-1])
    assert resumed["mask_hash"] == whole[1]["mask_hash"]
    assert resumed["value"] == whole[1]["value"]
    for name in ("model.safetensors", "nxm_scales.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (whole[0] / name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "killed" / "train_log.jsonl").read_text().splitlines()]
    assert len({(line["phase"], line["step"], "residual" in line) for line in lines}) == len(lines)  # nothing twice
    assert not (tmp_path / ".killed.work").exists()


@pytest.mark.slow
def test_same_seed_same_masks_and_another_seed_others(prepared: Path, tmp_path: Path) -> None:
    hashes = [run(prepared, tmp_path / str(i), steps=8, seed=seed).mask_hash for i, seed in enumerate((1, 1, 2))]
    assert hashes[0] == hashes[1] != hashes[2]


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
    with pytest.raises(DataError, match="percentile"):
        Settings(percentile=0.0)
    with pytest.raises(DataError, match="at least 1"):
        Settings(batch_size=0)


@pytest.mark.slow
def test_saving_takes_place_often_enough_to_matter(prepared: Path, tmp_path: Path) -> None:
    """A tenth of a phase is the most that a kill can cost."""
    child = start(prepared, tmp_path / "out")
    assert child.stdout is not None
    seen: list[str] = []
    for line in child.stdout:
        if line.startswith("admm"):
            seen += [path.name for path in (tmp_path / ".out.work" / "admm").glob("checkpoint-*")]
        if line.startswith("qat"):
            break
    child.kill()
    child.wait()
    assert len(set(seen)) >= 5


def test_threads_setting_is_obeyed(prepared: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        run(prepared, tmp_path / "out", steps=2, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_is_scored_is_what_is_saved(prepared: Path, tmp_path: Path) -> None:
    """Weights that are not quantized are stored in 16 bit; half of them are planned dense here."""
    from engines.parity.parts import run_all
    from engines.reference.pytorch import load
    from nxm_export.contract.io_spec import IOSpec
    from nxm_export.contract.tasks import TASKS
    from nxm_export.data.examples import encode
    from nxm_export.data.label_kinds import classes_of, labelled, load_labelled
    from nxm_export.data.tokenization import load_tokenizer

    task, dev, source = TASKS["classification"], prepared / "dev.tsv", resolve(prepared / "dense")
    plan = source.family.uniform_plan(
        source.config, WeightSpec.parse("2:4"), placement="inputs", keep_dense=["*.attention.*"]
    )
    given: dict[str, Any] = {"task": task.name, "train": str(prepared / "train.tsv"), "dev": str(dev), "plan": plan}
    out, file = tmp_path / "checkpoint", tmp_path / "outputs.safetensors"
    settings = Settings(**{**FAST, "recipe": "one-shot"})
    compress(prepared / "dense", out=out, outputs=file, settings=settings, **given)
    raw = load_labelled(str(dev), "dev", Columns(), task)
    examples = labelled(raw, task, classes_of(raw, task, source.classes()))
    with load(out, task=task.name) as reference:
        spec_ = IOSpec.of(out, source.config, source.family, task)
        features = encode(load_tokenizer(out), examples, spec_.max_length, spec_.inputs)
        expected = run_all(reference, features, spec_)["logits"]
    # float32 rounding of sums in another order; weights that were not rounded to 16 bit differ by 1e-3 here
    np.testing.assert_allclose(load_file(file)["logits"].numpy(), expected, rtol=0, atol=2e-5)


def test_of_two_into_one_directory_the_second_is_refused_and_the_first_goes_on(prepared: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def meanwhile(what: str, done: int, total: int) -> None:
        if what == "qat" and not refused:
            work = sorted(path.name for path in (tmp_path / ".checkpoint.work").iterdir())
            with pytest.raises(ArtifactError, match="is being written by another nxm process") as caught:
                run(prepared, tmp_path / "checkpoint", steps=4)
            refused.append(str(caught.value))
            assert sorted(path.name for path in (tmp_path / ".checkpoint.work").iterdir()) == work

    run(prepared, tmp_path / "checkpoint", steps=4, progress=meanwhile)
    assert refused
    open_checkpoint(tmp_path / "checkpoint").require_valid()
    (tmp_path / ".checkpoint.partial").mkdir()  # of a process that is dead, whose lock the kernel took back
    run(prepared, tmp_path / "checkpoint", steps=4)


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
