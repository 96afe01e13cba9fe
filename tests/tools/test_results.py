"""The measuring tool: runs only what is missing, keeps predictions, and renders what they say."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import pytest

from compressors.search.settings import SearchSettings
from compressors.settings import Losses, Settings
from nxm_export.contract.records.search_result import FullRun, PlanScore, SampleCounts, SearchBudget, SearchCost
from nxm_export.data.metrics import interval, mcc, metric_named, paired_interval
from nxm_export.data.more_text import MoreText
from nxm_export.errors import ArtifactError, DataError, NxmError, PlanError
from tests.support import tiny
from tools import ROOT
from tools.results import tasks
from tools.results.__main__ import main
from tools.results.bootstrap import resampled
from tools.results.page import render
from tools.results.pooled import Estimate, Pool, seed_draws, sentence_draws
from tools.results.readme import results_table
from tools.results.records import (
    Compression,
    CompressionFacts,
    Machine,
    PlanFacts,
    Record,
    Samples,
    SearchFacts,
    Sizes,
    TrainingFacts,
    decode_classes,
    digest,
    one_hot,
)
from tools.results.rows import STANDARD, row_named, rows_named
from tools.results.run import Clock, changed
from tools.results.statistics import TaskStatistics, overall
from tools.results.store import RESULTS, TaskStore

FAST = [
    "--max-length",
    "48",
    "--dense-steps",
    "30",
    "--steps",
    "4",
    "--batch-size",
    "16",
    "--learning-rate",
    "1e-3",
    "--precision",
    "fp32",
    "--dense-learning-rates",
    "3e-3",
    "--search-samples",
    "32",
    "--search-held-out",
    "32",
    "--threads",
    "1",
]
ROWS = "dense,dense-longer,one-shot-2:4+W4,magnitude-2:4+W4,nxm-2:4+W4,searched-packed-87.5"


DRAWS = 100  # resamples in these tests: scikit-learn needs a millisecond for each


@pytest.fixture(scope="module", autouse=True)
def _few_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("nxm_export.data.bootstrap_intervals", "tools.results.bootstrap", "tools.results.statistics"):
            patch.setattr(f"{module}.RESAMPLES", DRAWS)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny pretrained encoder and GLUE files, measured once."""
    out = tmp_path_factory.mktemp("results")
    tiny.write_model("bert", out / "encoder")
    tiny.write_data(out / "glue")
    assert measure(out, ROWS) == 0
    return out


def measure(place: Path, rows: str, *more: str, seeds: str = "0") -> int:
    paths = ["--data", str(place / "glue"), "--model", str(place / "encoder")]
    where = ["--work", str(place / "work"), "--results", str(place / "results")]
    return main(["run", "--task", "cola", "--rows", rows, "--seeds", seeds, *paths, *where, *FAST, *more])


def cola(place: Path) -> TaskStore:
    return TaskStore(place / "results", tasks.task_named("cola"))


def records(place: Path) -> dict[str, Record]:
    return {record.row: record for record in cola(place).records() if record.seed == 0}


def facts_of(record: Record) -> CompressionFacts:
    assert record.compressed is not None
    return record.compressed


def test_every_row_is_measured_from_one_dense_model(place: Path) -> None:
    measured = records(place)
    assert set(measured) == {row_named(name).name for name in ROWS.split(",")}
    teacher = measured["dense"].weights_sha256
    assert {record.teacher_sha256 for row, record in measured.items() if row != "dense"} == {teacher}
    steps = {row: measured[row].steps for row in ("nxm-2:4+W4", "one-shot-2:4+W4", "dense-longer")}
    assert steps == {"nxm-2:4+W4": 4, "one-shot-2:4+W4": 0, "dense-longer": 4}
    ours = facts_of(measured["nxm-2:4+W4"])
    assert ours.bytes.packed < ours.bytes.engine_sparse < ours.bytes.engine_dense < ours.bytes.fp32
    assert ours.compression.values == 1 - 4 / 2 / 32
    assert measured["nxm-2:4+W4"].dev_reads == 1
    assert ours.kl_to_dense is not None
    assert 0 < ours.kl_to_dense < 5
    assert ours.kl_by_sentence is not None
    assert len(ours.kl_by_sentence) == len(measured["nxm-2:4+W4"].predictions)
    assert np.mean(ours.kl_by_sentence) == pytest.approx(ours.kl_to_dense, rel=1e-4)  # five digits of each are kept
    assert set(ours.plan.weights.values()) == {"2:4+W4"}
    assert facts_of(measured["searched-packed-87.5"]).compression.packed >= 0.875
    assert cola(place).sensitivity_file(0).is_file()


def test_a_record_holds_what_its_predictions_say_and_no_path(place: Path) -> None:
    labels = decode_classes(cola(place).labels())
    lines = (place / "glue" / "dev.tsv").read_text().splitlines()[1:]
    assert labels.tolist() == [int(line.split("\t")[1]) for line in lines]
    for row, record in records(place).items():
        assert record.metrics["mcc"].value == mcc(one_hot(record.predictions, 2), labels), row
    assert str(place) not in cola(place).file.read_text()
    checkpoint = json.loads((place / "work" / "cola" / "s0" / "nxm-2of4+W4" / "metrics.json").read_text())
    predictions = decode_classes(records(place)["nxm-2:4+W4"].predictions)
    assert checkpoint["value"] == float((predictions == labels).mean())


def test_nothing_is_measured_twice_and_a_deleted_record_is_measured_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = cola(place).file
    written, before = file.stat().st_mtime_ns, file.read_text().splitlines()
    assert measure(place, ROWS) == 0
    assert "0 measured, 6 were there" in capsys.readouterr().err
    assert file.stat().st_mtime_ns == written
    (gone,) = [number for number, line in enumerate(before) if '"row": "magnitude-2:4+W4"' in line]
    file.write_text("".join(f"{line}\n" for line in [*before[:gone], *before[gone + 1 :]]))
    assert measure(place, ROWS) == 0
    after = file.read_text().splitlines()
    assert [number for number in range(len(before)) if after[number] != before[number]] in ([], [gone])
    old, new = (json.loads(lines[gone]) for lines in (before, after))
    assert new["predictions"] == old["predictions"]
    assert new["compressed"]["mask_sha256"] == old["compressed"]["mask_sha256"]


def test_other_settings_are_told_and_do_not_replace_a_record_or_the_dense_model(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(place, "nxm-2:4+W4", "--learning-rate", "2e-3") == 0
    assert "measured with another learning_rate" in capsys.readouterr().err
    assert measure(place, "nxm-2:4+W8", "--dense-steps", "31") == 1
    assert "was trained with other settings" in capsys.readouterr().err
    (place / "other").mkdir()
    for split in ("train", "dev"):
        (place / "other" / f"{split}.tsv").write_text((place / "glue" / f"{split}.tsv").read_text())
    dev = (place / "other" / "dev.tsv").read_text()
    (place / "other" / "dev.tsv").write_text(dev.replace("\t1\n", "\t0\n", 1))
    assert measure(place, "dense", "--data", str(place / "other"), "--work", str(place / "work2"), seeds="7") == 1
    assert "the dev set is another one" in capsys.readouterr().err


def test_the_dense_grid_is_decided_on_held_out_training_sentences(place: Path, tmp_path: Path) -> None:
    options = ["--dense-learning-rates", "1e-6,3e-3", "--held-out", "40", "--results", str(tmp_path / "results")]
    assert measure(place, "dense", *options, "--work", str(tmp_path / "work")) == 0
    store = cola(tmp_path)
    grid = store.grid()
    assert grid is not None
    scores = {rate: score for (rate, _), score in grid.scores.items()}
    assert scores[3e-3] > scores[1e-6]
    assert records(tmp_path)["dense"].settings["dense_learning_rate"] == 3e-3
    train = set((tmp_path / "work" / "cola" / "data" / "train.tsv").read_text().splitlines())
    held_out = (tmp_path / "work" / "cola" / "grid" / "data" / "dev.tsv").read_text().splitlines()
    assert len(held_out) == 41
    assert set(held_out) <= train
    page = tmp_path / "docs" / "results.md"
    assert "the best one is what every dense row uses" in render(tmp_path / "results", page).text
    store.write_grid(replace(grid, tried=tuple(replace(entry, score=-entry.score) for entry in grid.tried)))
    assert (
        "dense rows use 0.003 and 3 epochs, which this grid did not choose" in render(tmp_path / "results", page).text
    )


def test_render_makes_a_document_from_real_records(place: Path) -> None:
    rendered = render(place / "results", place / "docs" / "results.md")
    for name in ROWS.split(","):
        assert f"`{name}`" in rendered.text
    assert "### Searched plans" in rendered.text
    assert str(place) not in rendered.text
    assert render(place / "results", place / "docs" / "results.md").text == rendered.text


def test_texts_of_other_sets_reach_training_and_are_recorded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, texts = tiny.write_data(tmp_path, seed=9)[0], tmp_path / "texts.txt"
    common = ("--task", "cola", "--data", str(place / "glue"))
    assert main(["texts", *common, "--from", str(other), "--out", str(texts), "--work", str(tmp_path / "work")]) == 0
    given: list[MoreText | None] = []

    def stop(*_: object, more_text: MoreText | None, **__: object) -> None:
        given.append(more_text)
        raise DataError("enough")

    monkeypatch.setattr("tools.results.run.compress", stop)
    assert measure(place, "admm-2:4+W4-more-text", "--more-text", str(texts)) == 1
    assert measure(place, "admm-2:4+W4") == 1
    assert given == [MoreText((str(texts),), 0.5), None]
    assert measure(place, "admm-2:4+W4-more-text") == 1
    assert len(given) == 2


def test_a_change_of_the_search_reaches_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stop(*_: object, settings: SearchSettings, **__: object) -> None:
        asked.append((settings.method, settings.samples, settings.held_out))
        raise DataError("enough")

    monkeypatch.setattr("tools.results.run.search", stop)
    assert measure(place, "searched-hw-75-thorough") == 1
    assert measure(place, "searched-hw-75") == 1
    assert asked == [("nxm", 256, 256), ("nxm", 32, 32)]


def test_a_search_is_taken_up_only_where_it_asked_the_same_of_the_same_model(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = list[str]()

    def stop(name: str) -> Callable[..., None]:
        def stopped(*_: object, **__: object) -> None:
            called.append(name)
            raise DataError("enough")

        return stopped

    for name in ("search", "compress"):
        monkeypatch.setattr(f"tools.results.run.{name}", stop(name))
    for more in ([], ["--search-samples", "40"], ["--steps", "5"]):
        assert measure(place, "searched-packed-87.5", "--results", str(tmp_path / "results"), *more) == 1
    assert called == ["compress", "search", "search"]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed (extra: report)")
def test_pictures_are_drawn_and_the_same_each_time(place: Path) -> None:
    images = render(place / "results", place / "docs" / "results.md").images
    names = [f"cola-{what}-{theme}.svg" for what in ("compression", "sensitivity") for theme in ("light", "dark")]
    assert [image.name for image in images] == names
    first = [image.read_bytes() for image in images]
    render(place / "results", place / "docs" / "results.md")
    assert [image.read_bytes() for image in images] == first


class Made(TypedDict, total=False):
    """Fields of a `Record` that a test sets."""

    settings: dict[str, object]
    versions: dict[str, str]
    weights_sha256: str
    teacher_sha256: str
    compressed: CompressionFacts


class Book:
    """A results directory that records with given predictions are put into."""

    def __init__(self, results: Path) -> None:
        self.results = results

    def write(self, task: str, row: str, seed: int, labels: str, predictions: str, **more: Unpack[Made]) -> None:
        record = Record(
            task=task,
            row=row_named(row).name,
            seed=seed,
            model="a model",
            data_sha256="d",
            settings={"dense_learning_rate": 1e-4},
            metrics={},
            samples=Samples(100, len(labels)),
            steps=10,
            epochs=1.0,
            seconds=5.0,
            dev_reads=1,
            versions={"commit": "abc1234"},
            machine=Machine("a CPU", "", 2),
            classes=2,
            labels_sha256=digest(labels),
            predictions=predictions,
        )
        self.store(task).add(replace(record, **more), labels)

    def store(self, task: str) -> TaskStore:
        return TaskStore(self.results, tasks.task_named(task))

    def statistics(self, task: str) -> TaskStatistics:
        return TaskStatistics(tasks.task_named(task), self.store(task).labelled_records())

    def page(self) -> str:
        return render(self.results, self.results / "docs" / "results.md").text


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path)


def compressed(hw: float = 0.9, kl: float | None = None, search: SearchFacts | None = None) -> CompressionFacts:
    """What a compressed row's record holds, every counting and size alike."""
    facts = CompressionFacts(
        recipe="nxm",
        kl_to_dense=kl,
        training=TrainingFacts(qat_steps=1, held_out_samples=1),
        mask_sha256="m",
        compression=Compression(hw, hw, hw),
        bytes=Sizes(1, 1, 1, 1, 1),
        plan=PlanFacts({"W4": 3}, {}),
    )
    return replace(facts, search=search)


def searched(resumed: bool) -> SearchFacts:
    best = PlanScore(origin="knapsack", predicted=None, joint=None, hw=0.9, packed=0.9, values=0.9, options={"W4": 3})
    cost = SearchCost({"all": 7.0}, FullRun(10, 5.0), resumed, None)
    return SearchFacts("nxm", SearchBudget("hw", 0.875, None, None), best, SampleCounts(32, 32), cost)


def flipped(labels: str, *positions: int) -> str:
    return "".join(str(1 - int(label)) if i in positions else label for i, label in enumerate(labels))


LABELS = "0110101101" * 4


def test_the_numbers_of_a_fixed_set_of_records(book: Book) -> None:
    facts = replace(
        compressed(),
        compression=Compression(hw=0.9, packed=0.90, values=0.9375),
        bytes=Sizes(fp32=8_000_000, packed=800_000, engine_sparse=1_250_000, engine_dense=2_000_000, file=3_000_000),
    )
    for seed, dense, ours in ((0, (1, 2), (1, 2, 3, 4)), (1, (5, 6), (5, 6, 7, 8, 9, 10))):
        book.write("rte", "dense", seed, LABELS, flipped(LABELS, *dense), weights_sha256=f"w{seed}")
        book.write("rte", "nxm-2:4+W4", seed, LABELS, flipped(LABELS, *ours), teacher_sha256="w0", compressed=facts)
    text = book.page()
    scores = next(line for line in text.splitlines() if "(`nxm-2:4+W4`)" in line)
    # 36 and 34 of 40 right: 90 and 85, mean 87.5, sd 5/sqrt(2); dense 95 both; 87.5/95 = 92.105 %
    assert "| 87.50 |" in scores
    assert "| 3.54 | 90.00 (0), 85.00 (1) |" in scores
    assert "92.11 (" in scores
    assert "†" in scores  # seed 1 came from another dense model
    assert "| 93.75 | 90.00 | 90.00 | 8.00 | 0.80 | 1.25 | 2.00 | 3.00 |" in text
    difference = next(line for line in text.splitlines() if line.startswith("| `nxm-2:4+W4` | -7.50 ("))
    assert "; 2) | –" in difference


def test_agreement_divergence_and_rivals_stand_in_the_page(book: Book) -> None:
    def write(row: str, facts: CompressionFacts, *wrong: int, commit: str = "abc1234") -> None:
        book.write("rte", row, 0, LABELS, flipped(LABELS, *wrong), compressed=facts, versions={"commit": commit})

    book.write("rte", "dense", 0, LABELS, flipped(LABELS, 1, 2))
    write("magnitude-2:4+W4", compressed(0.90, 0.5), 1, 2, 3, 4, 5, 6)
    write("obs-2:4+W4", compressed(0.90, 0.25), 1, 2, 3, 4)
    write("nxm-2:4+W4", compressed(0.90, 0.2), 1, 2, 3)
    write("obs-W4", compressed(0.87, 0.125), 1, 2)
    write("obs-2:4+W4-layers", compressed(0.90, 0.2), 1, 2, 3)
    write("magnitude-2:4+W4-slow", compressed(0.90, 0.2), 1, 2, 3, commit="abc1234-dirty")
    write("searched-hw-87.5", compressed(0.875, 0.1, search=searched(resumed=False)), 1)
    write("paper-search-hw-87.5", compressed(0.875, 0.3, search=searched(resumed=True)), 1, 2, 3)
    page = book.page()
    ours = next(line for line in page.splitlines() if "(`obs-2:4+W4`)" in line)
    assert ours.endswith("| 95.00 | 0.250 |")  # 2 of 40 answers differ from the dense model's
    assert next(line for line in page.splitlines() if line.startswith("| dense (`dense`)")).endswith("| – | – | – |")
    rivals = page.split("### Ours against the others")[1].split("###")[0]
    pairs = {tuple(cell.strip(" `") for cell in line.split("|")[1:3]) for line in rivals.splitlines() if "`" in line}
    assert pairs == {
        ("obs-2:4+W4", "nxm-2:4+W4"),
        ("obs-2:4+W4", "magnitude-2:4+W4"),
        ("nxm-2:4+W4", "obs-2:4+W4"),
        ("nxm-2:4+W4", "magnitude-2:4+W4"),
        ("nxm-2:4+W4", "magnitude-2:4+W4-slow"),  # a baseline at its other learning rate
        ("obs-2:4+W4", "magnitude-2:4+W4-slow"),
        ("searched-hw-87.5", "obs-W4"),  # the uniform plan nearest in size, not the smaller one
        ("searched-hw-87.5", "paper-search-hw-87.5"),
    }
    costs = [line for line in page.split("### Cost")[1].split("###")[0].splitlines() if line.startswith("| `")]
    seconds = {line.split("`")[1]: line.split("|")[-3].strip() for line in costs}
    assert seconds["searched-hw-87.5"] == "7"
    assert seconds["paper-search-hw-87.5"] == "resumed", "its seconds are not all that it took"
    assert "`magnitude-2:4+W4-slow` (0)" in page.split("changes that were not committed")[1].split("\n")[0]
    line = next(line for line in rivals.splitlines() if "paper-search" in line)
    assert "| +5.00 (" in line  # 39 of 40 against 37


def test_ablations_stand_apart_behind_the_rows_that_change_nothing(book: Book) -> None:
    book.write("rte", "dense", 0, LABELS, flipped(LABELS, 1, 2))
    for row in ("nxm-2:4+W4", "nxm-2:4+W4-slow"):
        book.write("rte", row, 0, LABELS, flipped(LABELS, 1, 2, 3), compressed=compressed())
    first, second = book.page().split(": ablations, and rows with other training")
    assert "(`nxm-2:4+W4`)" in first
    assert "(`nxm-2:4+W4`)" not in second
    assert "(`nxm-2:4+W4-slow`)" not in first
    assert "(`nxm-2:4+W4-slow`)" in second


def test_intervals_of_one_seed_are_those_of_the_product(book: Book) -> None:
    rng = np.random.default_rng(0)
    labels = "".join(rng.choice(list("01"), 120))
    for row in ("dense", "magnitude-2:4+W8", "nxm-2:4+W8"):
        book.write("cola", row, 0, labels, flipped(labels, *rng.choice(120, 20, replace=False)))
    statistics = book.statistics("cola")
    logits = {row: labelled.logits for (row, _), labelled in statistics.records.items()}
    ours, right = logits["nxm-2:4+W8"], decode_classes(labels)
    for reference in ("dense", "magnitude-2:4+W8"):
        difference = statistics.difference("nxm-2:4+W8", reference)
        assert difference is not None
        # The last digits come from another order of additions.
        expected = paired_interval("mcc", ours, logits[reference], right)
        assert difference.interval == pytest.approx(expected, abs=1e-12)
    assert statistics.interval("nxm-2:4+W8") == pytest.approx(interval("mcc", ours, right), abs=1e-12)
    assert statistics.difference("dense", "dense") is None


@pytest.mark.parametrize(("metric", "classes"), [("accuracy", 2), ("accuracy", 3), ("f1", 2), ("mcc", 2), ("mcc", 3)])
def test_resampled_metrics_are_those_of_scikit_learn(metric: str, classes: int) -> None:
    rng = np.random.default_rng(0)
    predictions, labels = (
        rng.integers(0, classes, 12),
        rng.integers(0, classes, 12),
    )  # few: some resamples are one class
    values, draws = resampled(metric, predictions, labels, classes), np.random.default_rng(0)
    for number in range(DRAWS):
        pick = draws.integers(0, 12, size=12)
        expected = metric_named(metric)(np.eye(classes)[predictions[pick]], labels[pick])
        assert values[number] == pytest.approx(expected, abs=1e-12)  # rounding of a few additions


def test_several_seeds_widen_an_interval_when_they_disagree(book: Book) -> None:
    for seed, wrong in ((0, 0), (1, 20)):
        book.write("rte", "dense", seed, LABELS, flipped(LABELS, *range(wrong)))
    low, high = book.statistics("rte").interval("dense")
    assert low < 0.6  # both draws the bad seed: 50 % right
    assert high == 1.0  # both draws the good one


def test_retention_over_tasks_is_the_ratio_of_means_with_the_mean_of_ratios_beside(book: Book) -> None:
    for name, dense, ours in (("rte", 10, 12), ("sst2", 4, 10)):  # wrong of 40
        book.write(name, "dense", 0, LABELS, flipped(LABELS, *range(dense)))
        book.write(name, "dense-longer", 0, LABELS, flipped(LABELS, *range(ours)))
    both = overall([book.statistics(name) for name in ("rte", "sst2")], "dense-longer")
    assert both is not None
    assert both[0].value == pytest.approx((28 + 30) / (30 + 36))
    assert both[1] == pytest.approx((28 / 30 + 30 / 36) / 2)
    assert both[0].interval is not None
    assert both[0].interval[0] < both[0].value < both[0].interval[1]
    book.write("rte", "magnitude-2:4+W4", 0, LABELS, LABELS)
    text = book.page()
    together = text[text.index("## GLUE tasks together") :].split("\n## ")[0]
    assert "| `dense-longer` | RTE (1), SST-2 (1) |" in together
    assert "magnitude" not in together  # one task has it: nothing is put together


def noisy(labels: str, rng: np.random.Generator, wrong: int) -> str:
    return flipped(labels, *rng.choice(len(labels), wrong, replace=False))


def write_starts(book: Book, rng: np.random.Generator) -> None:
    """Two tasks of different sizes, two seeds of one and one of the other, a dense row and two starts."""
    for task, size, seeds in (("rte", 30, (0, 1)), ("sst2", 50, (2,))):
        labels = "".join(rng.choice(list("01"), size))
        for seed in seeds:
            book.write(task, "dense", seed, labels, noisy(labels, rng, 6))
            for row, wrong, scale in (("admm-2:4+W4", 7, 0.02), ("obs-2:4+W4", 9, 0.03)):
                kl = tuple(float(value) for value in rng.exponential(scale, size))
                facts = replace(compressed(kl=float(np.mean(kl))), kl_by_sentence=kl)
                book.write(task, row, seed, labels, noisy(labels, rng, wrong), compressed=facts)


def slow_pool(book: Book, row: str, other: str) -> tuple[list[float], list[float], list[float]]:
    """(retention, difference, ratio of KL): the whole, then every resample, written out with lists."""
    cells = {"rte": (0, 1), "sst2": (2,)}
    statistics = {task: book.statistics(task).records for task in cells}

    def right(task: str, name: str, seed: int, picks: list[int]) -> float:
        record = statistics[task][name, seed]
        return sum(record.record.predictions[i] == str(record.labels[i]) for i in picks) / len(picks)

    def kl(task: str, name: str, seed: int, picks: list[int]) -> float:
        values = facts_of(statistics[task][name, seed].record).kl_by_sentence
        assert values is not None
        return sum(values[i] for i in picks) / len(picks)

    def once(picks: dict[str, list[int]], seeds: dict[str, list[int]]) -> tuple[float, float, float]:
        retained: dict[str, list[float]] = {row: [], other: []}
        far: dict[str, list[float]] = {row: [], other: []}
        for task in cells:
            for name in (row, other):
                read = picks[task]
                ratios = [right(task, name, seed, read) / right(task, "dense", seed, read) for seed in seeds[task]]
                retained[name].append(sum(ratios) / len(ratios))
                far[name].append(sum(kl(task, name, seed, read) for seed in seeds[task]) / len(seeds[task]))
        ours, theirs = (sum(retained[name]) / 2 for name in (row, other))
        return ours, ours - theirs, sum(far[row]) / sum(far[other])

    whole = {task: list(range(len(statistics[task]["dense", seeds[0]].labels))) for task, seeds in cells.items()}
    found = [once(whole, {task: list(seeds) for task, seeds in cells.items()})]
    sentences = [sentence_draws(len(whole[task]), number) for number, task in enumerate(cells)]
    drawn = [seed_draws(len(seeds), number) for number, seeds in enumerate(cells.values())]
    for resample in range(DRAWS):
        picks = {task: [int(i) for i in sentences[number][resample]] for number, task in enumerate(cells)}
        chosen = {
            task: [seeds[int(i)] for i in drawn[number][resample]] for number, (task, seeds) in enumerate(cells.items())
        }
        found.append(once(picks, chosen))
    retention, difference, ratio = (list(column) for column in zip(*found, strict=True))
    return retention, difference, ratio


def test_pooled_comparisons_are_those_of_sums_written_out(book: Book) -> None:
    write_starts(book, np.random.default_rng(3))
    pool = Pool([book.statistics("rte"), book.statistics("sst2")])
    comparison = pool.compare("admm-2:4+W4", "obs-2:4+W4")
    assert comparison is not None
    assert comparison.cells == (("rte", 0), ("rte", 1), ("sst2", 2))
    assert comparison.ratio is not None
    expected = slow_pool(book, "admm-2:4+W4", "obs-2:4+W4")
    for estimate, (value, *drawn) in zip(
        (comparison.retention, comparison.difference, comparison.ratio), expected, strict=True
    ):
        assert estimate.value == pytest.approx(value, abs=1e-12)  # additions in another order
        assert estimate.interval == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=1e-12)
    assert pool.retention("admm-2:4+W4") == comparison.retention


def test_only_cells_that_have_every_row_count_and_those_for_choosing_can_be_left_out(book: Book) -> None:
    write_starts(book, np.random.default_rng(3))
    labels = book.store("rte").labels()
    book.write("rte", "dense", 5, labels, labels)
    book.write("rte", "admm-2:4+W4", 5, labels, labels, compressed=compressed(kl=0.5))
    statistics = [book.statistics("rte"), book.statistics("sst2")]
    comparison = Pool(statistics).compare("admm-2:4+W4", "obs-2:4+W4")
    assert comparison is not None
    assert ("rte", 5) not in comparison.cells
    assert ("rte", 5) in Pool(statistics).cells("admm-2:4+W4", "dense")
    left = Pool(statistics, frozenset({("rte", 0), ("sst2", 2)})).compare("admm-2:4+W4", "obs-2:4+W4")
    assert left is not None
    assert left.cells == (("rte", 1),)
    assert Pool(statistics).compare("admm-2:4+W4", "magnitude-2:4+W4") is None


def test_rows_without_training_are_compared_among_themselves(book: Book) -> None:
    book.write("rte", "dense", 0, LABELS, LABELS)
    for row in ("admm-2:4+W4", "obs-2:4+W4", "admm-2:4+W4-untrained", "obs-2:4+W4-untrained"):
        book.write("rte", row, 0, LABELS, flipped(LABELS, 1), compressed=compressed(kl=0.1))
    text = book.page()
    section = text[text.index("## Starts of training compared") :].split("\n## ")[0]
    assert "| `admm-2:4+W4-untrained` | `obs-2:4+W4-untrained` | RTE (0) |" in section
    assert "| `admm-2:4+W4` | `obs-2:4+W4` | RTE (0) |" in section
    assert "| `admm-2:4+W4` | `obs-2:4+W4-untrained` |" not in section


def test_a_record_without_divergences_by_sentence_gives_a_ratio_without_an_interval(book: Book) -> None:
    for row, kl in (("admm-2:4+W4", 0.02), ("obs-2:4+W4", 0.08)):
        book.write("rte", row, 0, LABELS, flipped(LABELS, 1), compressed=compressed(kl=kl))
    book.write("rte", "dense", 0, LABELS, LABELS)
    comparison = Pool([book.statistics("rte")]).compare("admm-2:4+W4", "obs-2:4+W4")
    assert comparison is not None
    assert comparison.ratio == Estimate(0.25, None)
    assert "| 0.250 | – |" in book.page()


@pytest.mark.parametrize(("low", "high", "side"), [(0.96, 0.994, -1), (0.98, 1.01, 0), (0.996, 1.02, 1)])
def test_an_interval_decides_where_it_lies_on_one_side(low: float, high: float, side: int) -> None:
    estimate = Estimate(1.0, (low, high))
    assert estimate.side(0.995) == side
    assert estimate.half_width == pytest.approx((high - low) / 2)
    assert Estimate(1.0, None).side(0.995) == 0


def test_no_retention_of_a_dense_model_that_knows_nothing(book: Book) -> None:
    book.write("cola", "dense", 0, LABELS, "1" * 40)  # MCC 0
    book.write("cola", "dense-longer", 0, LABELS, LABELS)
    assert book.statistics("cola").retention("dense-longer") is None
    book.write("cola", "dense", 0, LABELS, flipped(LABELS, *range(17)))  # little above 0, and below in some resamples
    retention = book.statistics("cola").retention("dense-longer")
    assert retention is not None
    assert retention.value > 1
    assert retention.interval is None


def test_records_with_other_settings_are_named(book: Book) -> None:
    known: dict[str, object] = {"learning_rate": 1e-4, "output_limit": 0.005}
    for row, epochs in (("nxm-2:4+W4", 6.0), ("magnitude-2:4+W4", 6.0), ("sr-ste-2:4+W4", 9.0)):
        settings = {**known, "epochs": epochs, "recipe": row.partition("-")[0]}
        book.write("rte", row, 0, LABELS, LABELS, compressed=compressed(), settings=settings)
    before_there_was_a_limit: dict[str, object] = {"learning_rate": 1e-4}
    book.write("rte", "obs-2:4+W4", 0, LABELS, LABELS, compressed=compressed(), settings=before_there_was_a_limit)
    text = book.page()
    assert "`sr-ste-2:4+W4`, seed 0, was measured with other settings: epochs 9.0 (usual 6.0)." in text
    assert "`obs-2:4+W4`, seed 0, was measured with other settings: output_limit null (usual 0.005)." in text
    assert text.count("was measured with other settings") == 2


def test_seconds_are_counted_on_for_the_same_work_alone(tmp_path: Path) -> None:
    file = tmp_path / "seconds"
    Clock(file, "one").keep()
    file.write_text(f"70.0 {file.read_text().split()[1]}\n")
    assert [int(Clock(file, work).seconds) for work in ("one", "other")] == [70, 0]
    file.write_text("70.0\n")  # before it was said of what
    assert int(Clock(file, "one").seconds) == 70


def test_bits_saved_are_of_the_seeds_that_count(book: Book) -> None:
    for task, seeds in (("cola", {0: 0.8, 1: 0.9}), ("rte", {0: 0.7})):
        for seed, hw in seeds.items():
            book.write(task, "obs-2:4+W4", seed, LABELS, LABELS, compressed=compressed(hw))
            book.write(task, "dense", seed, LABELS, LABELS)
    book.write("rte", "obs-2:4+W4", 5, LABELS, LABELS, compressed=compressed(0.1))  # of no dense model
    assert "| 80.0 % |" in results_table(book.results)


def test_the_score_of_mrpc_is_the_mean_of_f1_and_accuracy(book: Book) -> None:
    book.write("mrpc", "dense", 0, "1100", "1000")
    assert book.statistics("mrpc").score("dense", 0) == pytest.approx((2 / 3 + 3 / 4) / 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f'"predictions": "{LABELS}"', '"predictions": "01"', "other dev sentences"),
        ('"seed": 0', '"seed": 0.5', "rte.jsonl:1: seed: "),
        ('"seconds": 5.0', '"seconds": NaN', "NaN is not a JSON number"),
        ('"seconds": 5.0', '"seconds": 5.0, "colour": "red"', "unknown field colour"),
        ("nxm-result/2", "nxm-result/1", "schema nxm-result/1 is not the nxm-result/2"),
        ("}", "", "rte.jsonl:1: not valid JSON"),
    ],
)
def test_damaged_records_are_refused_by_line_and_field(book: Book, old: str, new: str, message: str) -> None:
    book.write("rte", "dense", 0, LABELS, LABELS)
    store = book.store("rte")
    text = store.file.read_text()
    assert old in text
    store.file.write_text(text.replace(old, new))
    with pytest.raises(NxmError, match=message):
        store.labelled_records()


def test_damaged_labels_are_refused(book: Book) -> None:
    book.write("rte", "dense", 0, LABELS, LABELS)
    file = book.store("rte").labels_file
    file.write_text(file.read_text().replace(LABELS, flipped(LABELS, 0)))
    with pytest.raises(ArtifactError, match="sha256"):
        book.store("rte").labels()


def test_a_new_record_is_one_new_line_at_its_place(book: Book) -> None:
    for row, seed in (("nxm-2:4+W4-slow", 0), ("obs-2:4+W4", 1), ("dense", 0)):
        book.write("rte", row, seed, LABELS, LABELS)
    before = book.store("rte").file.read_text().splitlines()
    book.write("rte", "obs-2:4+W4", 0, LABELS, LABELS, compressed=compressed(kl=0.25))
    after = book.store("rte").file.read_text().splitlines()
    assert [line for line in after if line in before] == before
    assert [(record.row, record.seed) for record in book.store("rte").records()] == [
        ("dense", 0), ("obs-2:4+W4", 0), ("obs-2:4+W4", 1), ("nxm-2:4+W4-slow", 0),
    ]  # fmt: skip
    assert len({tuple(json.loads(line)) for line in after}) == 1, "every line has the same keys"


def test_processes_that_write_at_the_same_time_lose_nothing(book: Book) -> None:
    seeds = range(12)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: book.write("rte", "dense", seed, LABELS, LABELS), seeds))
    assert [record.seed for record in book.store("rte").records()] == list(seeds)


def test_the_committed_page_is_that_of_the_committed_records(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:  # this page has all resamples
        for module in ("nxm_export.data.bootstrap_intervals", "tools.results.bootstrap", "tools.results.statistics"):
            patch.setattr(f"{module}.RESAMPLES", 1000)
        assert render(RESULTS, tmp_path / "results.md").text == (ROOT / "docs" / "results.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("task", "lines", "sentence", "pair", "labels"),
    [
        ("cola", ['gj04\t1\t\tThe "car" honked.', "gj04\t0\t*\tHim left."], 'The "car" honked.', "", ["1", "0"]),
        ("cola", ["sentence1\tsentence2\tlabel", "He left.\t\t1", "Him left.\t\t0"], "He left.", "", ["1", "0"]),
        (
            "rte",
            ["index\tsentence1\tsentence2\tlabel", "0\tA b.\tC.\tentailment", "1\tD.\tE.\tnot_entailment"],
            "A b.",
            "C.",
            ["entailment", "not_entailment"],
        ),
        (
            "mrpc",
            ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tA b.\t"C.', "0\t7\t9\tD.\tE."],
            "A b.",
            '"C.',
            ["1", "0"],
        ),
    ],
    ids=["CoLA as shipped", "CoLA with a header", "RTE", "MRPC"],
)
def test_glue_files_are_read_as_shipped(
    tmp_path: Path, task: str, lines: list[str], sentence: str, pair: str, labels: list[str]
) -> None:
    (tmp_path / "glue").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "glue" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = tasks.prepare(tasks.task_named(task), tmp_path / "glue", tmp_path / "out")
    rows = [line.split("\t") for line in files.dev.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ["sentence1", "sentence2", "label"]
    assert rows[1][:2] == [sentence, pair]
    assert [row[2] for row in rows[1:]] == labels


def test_bad_requests_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PlanError, match="unknown row 'best'"):
        row_named("best")
    with pytest.raises(PlanError, match="row 'nxm-5:4'"):
        row_named("nxm-5:4")
    with pytest.raises(DataError, match="--data"):
        tasks.prepare(tasks.task_named("cola"), None, tmp_path / "out")
    with pytest.raises(DataError, match="no such file"):
        tasks.prepare(tasks.task_named("cola"), tmp_path, tmp_path / "out")
    assert main(["run", "--task", "cola", "--rows", "dense", "--seeds", "x", "--data", str(tmp_path)]) == 1
    assert "--seeds 'x'" in capsys.readouterr().err
    for seeds in ("0.5", "nan", "inf"):
        assert main(["run", "--task", "cola", "--rows", "dense", "--seeds", seeds, "--data", str(tmp_path)]) == 1
        assert f"--seeds are whole numbers, got {seeds}" in capsys.readouterr().err
    assert main(["run", "--task", "chess", "--rows", "dense"]) == 2


def test_all_is_every_standard_row_once() -> None:
    assert [row.name for row in rows_named("all,dense")] == list(STANDARD)
    assert row_named("searched-hw-87.5").search == ("nxm", "hw", 0.875)
    assert row_named("paper-search-hw-87.5").search == ("paper", "hw", 0.875)
    ablation = row_named("one-shot-1:4+W4-permuted-activation")
    assert ablation.settings == {"recipe": "one-shot", "permute": True, "mask_scores": "activation"}
    assert row_named("nxm-2:4+W8-attention-table").plan == {"placement": "attention", "embedding": "int8"}
    thorough = row_named("searched-hw-87.5-thorough")
    assert (thorough.search, thorough.settings) == (("nxm", "hw", 0.875), {"recipe": "obs"})
    assert thorough.searching == {"samples": 256, "held_out": 256}
    longer = row_named("nxm-2:4+W4-18-epochs-joint-ste")
    assert (longer.option, longer.settings) == ("2:4+W4", {"recipe": "nxm", "epochs": 18.0, "admm": "joint-ste"})
    for name, losses in (
        ("nxm-2:4+W4-logits", Losses(0.0, 1.0, 0.0)),
        ("nxm-2:4+W4-unaugmented-logits", Losses(0.5, 1.0, 0.0)),
        ("nxm-2:4+W4-labelled", Losses(0.5, 1.0, 1.0)),
        ("nxm-2:4+W4-alone", Losses()),
    ):
        assert changed(Settings(), row_named(name), 384).losses == losses, name
    more = row_named("admm-2:4+W4-much-more-text")
    assert (more.more_text, more.settings, row_named("admm-2:4+W4-more-text").more_text) == (
        0.8,
        {"recipe": "admm"},
        0.5,
    )
    assert changed(Settings(augment=0.0), more, 384).losses == Losses(0.0, 1.0, 10.0)
    assert row_named("searched-hw-90").recipe == "obs"
    untrained = row_named("obs-refit-2:4+W4-untrained")
    assert (untrained.settings, untrained.option) == ({"recipe": "obs-refit", "steps": 0}, "2:4+W4")
    assert untrained.baseline == "magnitude-2:4+W4-untrained"
    assert not changed(Settings(epochs=6.0), untrained, 384).trains
    # So what was measured of trained rows is still of today's settings, and what was of untrained ones is named.
    assert changed(Settings(), untrained, 384).percentile is None
    assert changed(Settings(), row_named("obs-refit-2:4+W4"), 384).percentile == 99.99
    assert changed(Settings(), row_named("obs-refit-2:4+W4"), 384).average == 0.0
    averaged = row_named("admm-2:4+W4-averaged")
    assert changed(Settings(), averaged, 384).average == Settings().average, "the rows that have the default"
    assert averaged.baseline == "magnitude-2:4+W4-averaged"
    assert row_named("searched-hw-90-admm-unaugmented").settings == {"recipe": "nxm", "augment": 0.0}
    former = row_named("searched-hw-90-unaugmented")
    assert (former.search, former.baseline) == (("nxm", "hw", 0.9), "magnitude-2:4+W4-unaugmented")
    assert (ablation.option, ablation.baseline) == ("1:4+W4", "magnitude-1:4+W4")
    assert (row_named("paper-2:4+W4").recipe, row_named("sr-ste-1:4+W4").option) == ("paper", "1:4+W4")
