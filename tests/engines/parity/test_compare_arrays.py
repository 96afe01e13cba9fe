"""What a comparison makes of known outputs: engine and checkpoint are tables of answers, so every number of the report
can be written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.parity import compare as module
from engines.parity.compare import compare, compare_all
from engines.parity.decisions import Reading
from engines.parity.gates import parse_gate
from engines.parity.parts import Part
from engines.parity.reports import ParityReport
from engines.parity.tolerance import DTYPE_ROUNDING, Expectation, compare_output
from engines.reference.pytorch import Perturbation
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.data.answer_spans import Window
from nxm_export.data.features import Features
from nxm_export.data.metrics import metric_named, paired_interval
from nxm_export.errors import ArtifactError, DataError, ParityError
from tests.support import tiny
from tests.support.intervals import interval
from tests.support.records import PASSPORT

Answer = Callable[[np.ndarray], dict[str, np.ndarray]]  # of ids (batch, sequence); a sample's first token is its number
CONFIG = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
PLAN = FAMILIES["bert"].uniform_plan(CONFIG, WeightSpec.parse("W8"))
NOISE, SHIFT = 0.002, 0.25


class Table:
    """An engine that answers by `answer`, and keeps the shapes that it was asked for."""

    inputs, clock = ("input_ids", "attention_mask"), "none"

    def __init__(self, outputs: Sequence[str], answer: Answer, asked: list[tuple[int, ...]]) -> None:
        self.outputs, self.answer, self.asked = tuple(outputs), answer, asked

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.asked.append(feeds["input_ids"].shape)
        return {name: values.astype(np.float32) for name, values in self.answer(feeds["input_ids"]).items()}

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class TablePart(Part):
    """An engine directory of `engine`, whose checkpoint is `reference`, or `changed` by a perturbation."""

    engine: Answer = field(kw_only=True)
    reference: Answer = field(kw_only=True)
    changed: Callable[[Perturbation], Answer] = field(kw_only=True)
    memory_of: Callable[[int, int], int] = field(kw_only=True)
    asked: dict[object, list[tuple[int, ...]]] = field(kw_only=True, default_factory=dict)

    def load(self) -> Any:
        return Table(list(self.spec.outputs), self.engine, self.asked.setdefault("engine", []))

    def load_reference(
        self, checkpoint: Path, *, exact: bool = False, perturbation: Perturbation = Perturbation()
    ) -> Any:
        answer = self.reference if exact else self.changed(perturbation)
        key = "exact" if exact else "shift" if perturbation.one_step_shift else "noise"
        return Table(list(self.spec.outputs), answer, self.asked.setdefault(key, []))

    def memory(self, batch: int, sequence: int) -> int:
        return self.memory_of(batch, sequence)


def spec_of(task: str, labels: tuple[str, ...] = ("a", "b")) -> IOSpec:
    return IOSpec("bert", task, Table.inputs, TASKS[task].outputs, labels, tiny.POSITIONS, 0)


def samples_of(lengths: Sequence[int], labels: Sequence[Any]) -> list[Features]:
    return [
        {"input_ids": [number, *[1] * (length - 1)], "attention_mask": [1] * length, "labels": label}
        for number, (length, label) in enumerate(zip(lengths, labels, strict=True))
    ]


def rows_of(values: np.ndarray) -> Answer:
    """Row by the sample's number."""
    return lambda ids: {"logits": values[ids[:, 0]]}


def moved(answer: Answer, by: float | Callable[[np.ndarray], np.ndarray]) -> Answer:
    """Every value moved by as much; of a function, by what it gives for the ids."""

    def given(ids: np.ndarray) -> dict[str, np.ndarray]:
        step = by(ids) if callable(by) else by
        return {name: values + step for name, values in answer(ids).items()}

    return given


def usual(reference: Answer) -> Callable[[Perturbation], Answer]:
    return lambda p: moved(reference, SHIFT if p.one_step_shift else NOISE)


@pytest.fixture
def report_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[ParityReport]]:
    """``report_of(parts, features, *gates)``: the reports of a comparison of parts."""

    def made(
        parts: Sequence[TablePart],
        features: Sequence[Features],
        *gates: str,
        reference_memory: Callable[[Path, int], int] = lambda *_: 0,
        **options: bool,
    ) -> list[ParityReport]:
        monkeypatch.setattr(module, "reference_memory", reference_memory)
        by_directory = {}
        for number, part in enumerate(parts):
            directory = tmp_path / f"engine{number}"
            directory.mkdir(exist_ok=True)
            by_directory[directory] = replace(part, directory=directory)
        monkeypatch.setattr(module, "open_part", lambda _, directory: by_directory[directory])
        asked = [*map(parse_gate, gates)]
        return list(compare_all("c", list(by_directory), features, gates=asked, **options).reports)

    return made


def part_of(
    spec: IOSpec,
    engine: Answer,
    reference: Answer,
    changed: Callable[[Perturbation], Answer] | None = None,
    *,
    plan: Any = PLAN,
    dtype: str = "float32",
    memory_of: Callable[[int, int], int] = lambda *_: 0,
) -> TablePart:
    passport = replace(PASSPORT, graph={"dtype": dtype, "placement": "inputs"})
    return TablePart(
        Path(),
        passport,
        spec,
        plan,
        engine=engine,
        reference=reference,
        changed=changed or usual(reference),
        memory_of=memory_of,
    )


class TestClasses:
    """300 sentences of two classes, of which the checkpoint has 240 right; the engine turns six answers over."""

    LABELS = np.arange(300) % 2
    REFERENCE = np.where((np.arange(300) % 5 == 0) ^ (LABELS == 1), 1.0, -1.0)[:, None] * [-0.125, 0.125]
    TURNED = (1, 2, 3, 4, 5, 299)  # five were right, number 5 was wrong
    FEATURES = samples_of([7] * 300, LABELS.tolist())

    @pytest.fixture
    def engine(self) -> np.ndarray:
        values = self.REFERENCE.copy()
        values[list(self.TURNED)] *= -1
        return values

    def part(self, engine: np.ndarray, **options: Any) -> TablePart:
        return part_of(spec_of("classification"), rows_of(engine), rows_of(self.REFERENCE), **options)

    def test_the_numbers_of_a_report(self, engine: np.ndarray, report_of: Callable[..., Any]) -> None:
        gates = ("drop<=1.4", "drop(f1)<=0", "drop(mcc)<=100", "flips<=1%", "flips<=2%", "max_abs<=0.25")
        (report,) = report_of([self.part(engine)], self.FEATURES, *gates)
        assert (report.samples, report.metric) == (300, "accuracy")
        assert (report.reference_value, report.engine_value) == (240 / 300, 236 / 300)
        assert report.difference == pytest.approx(-4 / 300)
        ours, theirs = engine.astype(np.float32), self.REFERENCE.astype(np.float32)
        assert report.reference_interval == interval("accuracy", theirs, self.LABELS)
        assert report.engine_interval == interval("accuracy", ours, self.LABELS)
        assert report.difference_interval == paired_interval("accuracy", ours, theirs, self.LABELS)
        assert report.difference_interval[0] < -4 / 300 < report.difference_interval[1]
        others = {name: tuple(metric_named(name)(o, self.LABELS) for o in (theirs, ours)) for name in ("f1", "mcc")}
        assert report.secondary_metrics == others
        measured = [100 * 4 / 300, *(100 * (before - after) for before, after in others.values()), 2.0, 2.0, 0.25]
        assert [gate.actual for gate in report.gates] == pytest.approx(measured)
        assert [gate.passed for gate in report.gates] == [True, False, True, False, True, True]
        (logits,) = report.outputs
        assert (logits.flips, logits.max_abs, logits.agreement) == (6, 0.25, 0.98)
        assert logits.max_tolerance == pytest.approx(3 * SHIFT + 0.125e-4)
        assert (logits.one_step_shift, logits.max_steps) == (pytest.approx(SHIFT), pytest.approx(0.25 / SHIFT))
        assert logits.passed
        assert not report.passed  # a gate failed

    def test_engines_are_held_against_each_other_in_both_directions(
        self, engine: np.ndarray, report_of: Callable[..., Any]
    ) -> None:
        parts = [self.part(engine), self.part(self.REFERENCE)]
        reports = report_of(parts, self.FEATURES)
        ours, theirs = (values.astype(np.float32) for values in (engine, self.REFERENCE))
        for report, sign, scored in zip(reports, (-1, 1), ((ours, theirs), (theirs, ours)), strict=True):
            (pair,) = report.pairs
            assert (pair.max_abs, pair.agreement, pair.output) == (0.25, 0.98, "logits")
            assert pair.mean_abs == pytest.approx(0.25 * 6 / 300)
            assert pair.difference == pytest.approx(sign * 4 / 300)
            assert pair.difference_interval == paired_interval("accuracy", *scored, self.LABELS)
        assert [Path(report.pairs[0].other).name for report in reports] == ["engine1", "engine0"]
        assert not parts[1].asked.get("exact"), "engines of one kind share their reference"

    def test_rounding_is_measured_on_256_samples_a_step_on_64_and_both_on_the_probes(
        self, report_of: Callable[..., Any]
    ) -> None:
        part = self.part(self.REFERENCE)
        report_of([part], self.FEATURES)

        def rows(key: str) -> tuple[int, list[tuple[int, ...]]]:
            shapes = part.asked[key]
            return sum(shape[0] for shape in shapes if shape[1] == 7), [shape for shape in shapes if shape[1] != 7]

        assert rows("exact") == (300, [(1, 1), (1, tiny.POSITIONS)])
        assert rows("noise") == (256, [(1, 1), (1, tiny.POSITIONS)])  # float32 rounds every copy alike
        assert rows("shift") == (64, [(4, 1), (4, tiny.POSITIONS)])
        short = self.part(self.REFERENCE, dtype="float16")
        report_of([short], self.FEATURES)
        assert short.asked["noise"][-2:] == [(4, 1), (4, tiny.POSITIONS)]

    def test_a_dense_model_has_no_step(self, report_of: Callable[..., Any]) -> None:
        part = self.part(self.REFERENCE, plan=None)
        (report,) = report_of([part], self.FEATURES)
        assert "shift" not in part.asked
        assert report.outputs[0].max_tolerance == pytest.approx(3 * NOISE + 0.125e-4, rel=1e-5)  # outputs are float32
        assert report.outputs[0].one_step_shift is None

    @pytest.mark.parametrize("wide", ["noise", "shift"])
    @pytest.mark.parametrize(("off", "passed"), [(5.99, True), (6.03, False)])
    def test_a_probe_is_allowed_what_moves_on_its_own_sample(
        self, wide: str, off: float, passed: bool, report_of: Callable[..., Any]
    ) -> None:
        """Of one token and of the maximum length, on which rounding or a step moves more than on all samples: by 2."""
        reference = rows_of(self.REFERENCE)

        def far(ids: np.ndarray) -> np.ndarray:
            return np.full((len(ids), 1), 0.0 if ids.shape[1] == 7 else 1.0)

        def changed(p: Perturbation) -> Answer:
            small = SHIFT if p.one_step_shift else NOISE
            return moved(reference, lambda ids: small + far(ids) * (2 if p.one_step_shift == (wide == "shift") else 0))

        engine = moved(reference, lambda ids: far(ids) * off)
        (report,) = report_of([part_of(spec_of("classification"), engine, reference, changed)], self.FEATURES)
        probes = {probe.name: probe for probe in report.probes}
        small = SHIFT if wide == "shift" else NOISE
        for name in ("one token", "maximum length"):
            assert probes[name].tolerated == pytest.approx(3 * (2 + small) + 0.125e-4)
            assert probes[name].passed is (off <= 3 * (2 + small) + 0.125e-4)
        assert report.outputs[0].max_abs == 0

    def test_another_number_of_classes_is_of_another_checkpoint(self, report_of: Callable[..., Any]) -> None:
        three = np.zeros((300, 3))
        with pytest.raises(ArtifactError, match=r"logits have shape \(3,\), those of the checkpoint \(2,\)"):
            report_of([self.part(three)], self.FEATURES)

    @pytest.mark.parametrize(
        ("gates", "message"),
        [
            (["cosine>=0.9"], "a gate on the cosine needs embeddings"),
            (["max_abs<=1", "drop(spearman)<=1"], r"drop\(spearman\)<=1: classification has the metrics accuracy, f1"),
            (["drop(mcc)<=1"], "every label is the same class, so MCC is 0"),
            (["drop<=1", "drop(f1)<=1"], "no label is 'b', so its F1 is 0"),
        ],
    )
    def test_a_gate_that_cannot_be_asked_is_refused(
        self, gates: list[str], message: str, report_of: Callable[..., Any]
    ) -> None:
        part = self.part(self.REFERENCE)
        with pytest.raises(DataError, match=message):
            report_of([part], samples_of([7] * 300, [0] * 300), *gates)
        assert not part.asked

    def test_no_samples_are_refused(self) -> None:
        with pytest.raises(DataError, match="no samples to compare on"):
            compare("c", "e", [])

    def test_what_the_engine_gave_is_kept_with_the_labels(
        self, engine: np.ndarray, report_of: Callable[..., Any]
    ) -> None:
        (report,) = report_of([self.part(engine)], self.FEATURES)
        kept = np.load(Path(report.engine) / "outputs.npz")
        assert set(kept) == {"logits", "labels"}
        assert np.array_equal(kept["logits"], engine.astype(np.float32))
        assert np.array_equal(kept["labels"], self.LABELS)

    @pytest.mark.parametrize("length", [1, 7])
    def test_a_change_of_the_checkpoint_that_is_no_number_is_refused(
        self, length: int, report_of: Callable[..., Any]
    ) -> None:
        reference = rows_of(self.REFERENCE)

        def changed(p: Perturbation) -> Answer:
            bad = np.nan if p.one_step_shift else NOISE
            return moved(reference, lambda ids: np.full((len(ids), 1), bad if ids.shape[1] == length else NOISE))

        with pytest.raises(ParityError, match="the checkpoint itself gives NaN or infinity"):
            report_of([part_of(spec_of("classification"), reference, reference, changed)], self.FEATURES)


def test_five_samples_have_no_interval(report_of: Callable[..., Any]) -> None:
    values = np.array([[1.0, -1.0]] * 5)
    (report,) = report_of(
        [part_of(spec_of("classification"), rows_of(values), rows_of(values))], samples_of([3] * 5, [0, 1, 0, 1, 0])
    )
    assert (report.reference_interval, report.engine_interval, report.difference_interval) == (None, None, None)
    assert json.loads((Path(report.engine) / "parity.json").read_text())["engine_interval"] is None


def test_a_regression_flips_nothing_and_says_so(report_of: Callable[..., Any]) -> None:
    values = np.arange(8.0)[:, None]
    part = part_of(spec_of("regression", ("s",)), rows_of(values), rows_of(values))
    with pytest.raises(DataError, match="a gate on flips needs classes, and regression has none"):
        report_of([part], samples_of([3] * 8, [0.5 * n for n in range(8)]), "flips<=1%")
    with pytest.raises(DataError, match="every label is 2, so there is no correlation"):
        report_of([part], samples_of([3] * 8, [2.0] * 8), "drop<=1")


def test_the_gate_on_the_cosine_is_about_the_worst_sample(report_of: Callable[..., Any]) -> None:
    reference = np.tile([3.0, 4.0], (8, 1))
    engine = reference.copy()
    engine[5] = [4.0, 3.0]  # cosine 24 / 25

    def answer(values: np.ndarray) -> Answer:
        return lambda ids: {"embedding": values[ids[:, 0]]}

    features = samples_of([3] * 8, [n / 8 for n in (0, 0, 1, 1, 2, 2, 3, 3)])
    for number, sample in enumerate(features):
        sample["group"] = number // 2
    (report,) = report_of(
        [part_of(spec_of("embedding", ()), answer(engine), answer(reference))], features, "cosine>=0.96", "cosine>=0.97"
    )
    assert [gate.actual for gate in report.gates] == pytest.approx([0.96, 0.96])
    assert [gate.passed for gate in report.gates] == [True, False]
    assert np.array_equal(np.load(Path(report.engine) / "outputs.npz")["groups"], [0, 0, 1, 1, 2, 2, 3, 3])


def test_padding_counts_for_nothing_and_the_longest_need_not_run_again(report_of: Callable[..., Any]) -> None:
    """Of 80 texts one has 9 tokens, the others 3. It is not among the 64 that a step is measured on."""
    lengths = [3] * 80
    lengths[4] = 9
    reference = np.where(np.arange(80)[:, None, None] % 2 == 0, [2.0, -2.0], [-2.0, 2.0]) * np.ones((80, 48, 1))
    engine = reference.copy()
    engine[:, 2] += 0.1  # one token of each text

    def answer(values: np.ndarray) -> Answer:
        return lambda ids: {"logits": values[ids[:, 0], : ids.shape[1]]}

    spec = spec_of("token-classification", ("O", "B-x"))
    labels = [[number % 2] * length for number, length in enumerate(lengths)]
    part = part_of(spec, answer(engine), answer(reference))
    (report,) = report_of([part], samples_of(lengths, labels))
    (logits,) = report.outputs
    assert logits.agreement == 1.0
    assert logits.mean_abs == pytest.approx(0.1 * 80 / sum(lengths))
    assert {shape[1] for shape in part.asked["shift"]} == {1, 3, 48}
    assert logits.max_tolerance == pytest.approx(3 * SHIFT + 2e-4)


def test_an_answer_begins_and_ends_where_it_may(report_of: Callable[..., Any]) -> None:
    """What an engine says of the question's tokens decides nothing."""
    window = Window(4, "a b c d", [0, 2, 4, 6], [1, 3, 5, 7], ["b"])
    reference, engine = np.zeros((8, 48)), np.zeros((8, 48))
    reference[:, 5] = engine[:, 5] = 1.0
    engine[:, 1] = 3.0  # outside
    engine[:2, 6] = 1.5  # inside: two of eight begin and end elsewhere

    def answer(begins: np.ndarray, ends: np.ndarray) -> Answer:
        values = {"start_logits": begins, "end_logits": ends}
        return lambda ids: {name: array[ids[:, 0], : ids.shape[1]] for name, array in values.items()}

    ends = engine.copy()
    ends[:, 1] = -5.0
    part = part_of(spec_of("question-answering", ()), answer(engine, ends), answer(reference, reference))
    features = samples_of([8] * 8, [window.pack()] * 8)
    for number, sample in enumerate(features):
        sample["group"] = number
    (report,) = report_of([part], features, "flips<=24%", "flips<=25%", "max_abs<=4.9", "max_abs<=5")
    assert [gate.passed for gate in report.gates] == [False, True, False, True]  # of the output that is furthest off
    assert {output.output: output.agreement for output in report.outputs} == {"start_logits": 0.75, "end_logits": 0.75}
    assert (report.reference_value, report.engine_value) == (1.0, 0.75)


def test_numbers_for_labels_in_another_order_are_noticed(report_of: Callable[..., Any], tmp_path: Path) -> None:
    values = np.where(np.arange(300)[:, None] % 2 == 0, [4.0, -4.0], [-4.0, 4.0])
    part = part_of(spec_of("classification"), rows_of(values), rows_of(values))
    turned = samples_of([3] * 300, [1 - number % 2 for number in range(300)])
    with pytest.raises(DataError, match="the data: its labels are numbers"):
        report_of([part], turned, numbered=True)
    assert not list(tmp_path.glob("*/parity.json"))
    (named,) = report_of([part], turned)  # names stand for themselves: the model is that bad
    assert named.reference_value == 0.0
    (right,) = report_of([part], samples_of([3] * 300, [number % 2 for number in range(300)]), numbered=True)
    assert right.reference_value == 1.0


def test_a_gate_on_the_table_is_about_what_compression_measured(
    report_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "embedding_table_drop", lambda _: 0.75)
    values = np.array([[1.0, -1.0]] * 8)
    part = part_of(spec_of("classification"), rows_of(values), rows_of(values))
    gates = ("embedding_table<=0.5", "embedding_table<=1", "drop<=0")
    (report,) = report_of([part], samples_of([3] * 8, [0, 1] * 4), *gates)
    assert [(gate.actual, gate.passed) for gate in report.gates] == [(0.75, False), (0.75, True), (0.0, True)]


@pytest.mark.parametrize(("available", "rows"), [(None, 8), (80, 8), (79, 4), (40, 4), (10, 1)])
@pytest.mark.parametrize("who", ["reference", "engine"])
def test_a_batch_is_halved_until_reference_and_engine_have_room(
    available: int | None, rows: int, who: str, report_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight texts of 10 tokens, which take a byte a token; the budget is a batch of eight."""
    values = np.array([[1.0, -1.0]] * 8)
    reads = rows_of(values)
    part = part_of(
        spec_of("classification"), reads, reads, memory_of=lambda b, s: (b * s + (b > 8) * 10**9) * (who == "engine")
    )
    monkeypatch.setattr(module, "MAX_BATCH_TOKENS", 80)
    monkeypatch.setattr(module, "available_memory", lambda: available)
    needed = (lambda _, tokens: tokens) if who == "reference" else (lambda *_: 0)
    features = samples_of([10] * 8, [0, 1] * 4)
    (report,) = report_of([part], features, reference_memory=needed)
    assert max(shape[0] for shape in part.asked["exact"] if shape[1] == 10) == rows
    longest = next(probe for probe in report.probes if probe.name == "maximum length")
    assert longest.passed is (True if available is None or available >= tiny.POSITIONS else None)


@pytest.mark.parametrize("count", [1, 3])
def test_the_largest_share_of_changed_decisions_is_in_percent(count: int) -> None:
    expected, zeros = np.array([[1.0, -1.0]] * 8), np.zeros((8, 2))
    actual = expected.copy()
    actual[:count] *= -1
    outputs = [
        compare_output("y", Expectation(expected, zeros, zeros), values, Reading(), quantized=False)
        for values in (expected, actual)
    ]
    assert module._flips(outputs) == 12.5 * count


@pytest.mark.parametrize(
    ("strongly_typed", "graph_dtype", "dtype"),
    [
        (False, "float32", "float16"),
        (True, "float32", "float32"),
        (None, "float32", "float32"),
        (False, "bfloat16", "bfloat16"),  # rounds more than float16 does
    ],
)
def test_an_engine_whose_builder_chose_types_is_judged_as_float16_though_its_graph_is_float32(
    strongly_typed: bool | None, graph_dtype: str, dtype: str
) -> None:
    """Weakly typed TensorRT runs what it likes of a float32 graph in FP16; the graph's scales stay float32."""
    part = part_of(spec_of("classification"), lambda _: {}, lambda _: {}, dtype=graph_dtype)
    options = {} if strongly_typed is None else {"strongly_typed": strongly_typed}
    part = replace(part, passport=replace(part.passport, options=options))
    assert (part.rounding, part.graph_dtype, part.dtype) == (DTYPE_ROUNDING[dtype], graph_dtype, dtype)
