"""Training phases: recipes, and what they give."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compressors.models import load_tokenizer, resolve
from compressors.pruning.layer_inputs import second_moments
from compressors.pruning.layerwise import ADMM, OutputMetric, Solution
from compressors.quantization.fake_quant import activation_quantizers, quant_linears
from compressors.quantization.prepare_bake import calibrate
from compressors.settings import Settings
from compressors.training.compress import compress, finetune
from compressors.training.phases import Job
from compressors.training.task_data import TaskDataRequest, read_task_data
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.records.checkpoint_metrics import read_metrics
from nxm_export.contract.tasks import task_named
from nxm_export.data.columns import Columns
from tests.support import tiny
from tests.support.trained import FAST, plan_for, run
from tests.support.variants import variants


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
    for name, solution in solutions(job_of(prepared, tmp_path / "work", spec, steps=0)).items():
        saved = torch.from_numpy(checkpoint.weight(name).copy())
        # A pattern without bits is stored in 16 bit; scales are kept as logarithms in float32.
        torch.testing.assert_close(saved, solution.weight, rtol=1e-3, atol=1e-6)


def test_training_starts_from_what_no_rounding_has_moved(prepared: Path, tmp_path: Path) -> None:
    """One step, so small that it changes nothing."""
    job = job_of(prepared, tmp_path / "work", "2:4+W4", steps=1, learning_rate=1e-12, average=0.0)
    student, facts = job.run()
    assert facts.qat_steps == 1
    for name, solution in solutions(job_of(prepared, tmp_path / "again", "2:4+W4", steps=1)).items():
        layer = quant_linears(student)[name]
        torch.testing.assert_close(layer.weight.detach(), solution.latent, rtol=1e-5, atol=1e-6)
        assert solution.scale is not None
        torch.testing.assert_close(layer.weight_scale, solution.scale)
        assert float((solution.latent - solution.weight).abs().max()) > 1e-3


def test_without_steps_ranges_are_those_of_the_compressed_model(prepared: Path, tmp_path: Path) -> None:
    """Calibrating once more, with the weights as they are saved, changes none."""
    job = job_of(prepared, tmp_path / "work", "2:4+W4", steps=0)
    before = [quantizer.scale for quantizer in activation_quantizers(job.prepared())]
    student, _ = job.run()
    found = [quantizer.scale for quantizer in activation_quantizers(student)]
    again = calibrate(student, job.calibration_batches(), job.settings.range_percentile)
    torch.testing.assert_close(torch.cat(found), torch.tensor(again))
    assert not torch.allclose(torch.cat(found), torch.cat(before)), "it had to be done again"


def job_of(prepared: Path, work: Path, spec: str, **settings: Any) -> Job:
    """A compression of the model `prepared` by layer-wise ADMM."""
    source, chosen = resolve(prepared / "dense"), Settings(**{**FAST, "recipe": "admm", **settings})
    request = TaskDataRequest(task_named("classification"), str(prepared / "train.tsv"))
    data = read_task_data(source, request, load_tokenizer(source), chosen)
    return Job(source, data, plan_for(prepared / "dense", spec), chosen, work, lambda *_: None)


def solutions(job: Job) -> dict[str, Solution]:
    """Those of every layer by itself, for the inputs that it has while no weight is rounded."""
    student = job.prepared()
    layers = quant_linears(student)
    for layer in layers.values():
        layer.quantize_weight = False
    hessians = second_moments(student, layers, job.calibration_batches())
    return {
        name: ADMM(layer.weight.detach(), OutputMetric(hessians[name]), layer.spec) for name, layer in layers.items()
    }


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


def test_short_texts_are_calibrated_on_until_there_are_enough_tokens(prepared: Path, tmp_path: Path) -> None:
    words = [f"{one} {other}" for one in tiny.WORDS[:10] for other in tiny.WORDS[:8]]
    (tmp_path / "short.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t{len(text) % 2}\n" for text in words))
    source = resolve(prepared / "dense")
    request = TaskDataRequest(task_named("classification"), str(tmp_path / "short.tsv"))
    settings = Settings(**{**FAST, "calibration_samples": 8})
    data = read_task_data(source, request, load_tokenizer(source), settings)
    job = Job(source, data, plan_for(prepared / "dense"), settings, tmp_path / "work", lambda *_: None)

    def tokens(wanted: int) -> int:
        return sum(int(batch["attention_mask"].sum()) for batch in job.calibration_batches(wanted))

    # four tokens a text
    assert [tokens(0), tokens(32), tokens(33), tokens(64), tokens(10**6)] == [32, 32, 36, 64, 4 * len(job.train)]
    run(prepared, tmp_path / "checkpoint", recipe="admm", steps=0, calibration_samples=2)


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
def test_same_seed_same_masks_and_another_seed_others(prepared: Path, tmp_path: Path) -> None:
    hashes = [run(prepared, tmp_path / str(i), steps=8, seed=seed).mask_hash for i, seed in enumerate((1, 1, 2))]
    assert hashes[0] == hashes[1] != hashes[2]


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
