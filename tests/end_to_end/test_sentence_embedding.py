"""Sentence embeddings: the pooling inside the model, other programs that read it, and what trains and measures it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from compressors.models import load_model, resolve
from compressors.search.plan_search import search
from compressors.search.settings import SearchSettings
from compressors.settings import Settings
from compressors.training.compress import compress, finetune
from compressors.training.output_divergence import divergence, vector_loss
from engines.parity.compare import compare
from engines.parity.gates import check_gate, parse_gate
from nxm_export.contract.checkpoint import has_head, read_config, read_tensor, task_at
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.pooling import Pooling, write_pooling
from nxm_export.contract.tasks import TASKS
from nxm_export.data.columns import Columns
from nxm_export.data.examples import Examples, encode
from nxm_export.data.features import label_array, pad
from nxm_export.data.label_kinds import labelled, load_labelled
from nxm_export.data.metrics import metric_named
from nxm_export.data.tokenization import load_tokenizer
from nxm_export.errors import ArtifactError, DataError
from nxm_export.graph.exporter import export
from nxm_export.graph.reading.graph_weights import load_graph
from nxm_export.hf.model_loading import load_task_model
from nxm_export.hf.sentence_embedding import embedding_model
from nxm_export.pipeline.engine_builds import build_engine
from nxm_export.pipeline.labelled_texts import features_of
from nxm_export.storage.json_files import entry_at
from tests.support import tiny
from tests.support.intervals import interval
from tests.support.variants import variants

TASK = TASKS["embedding"]
TINY = Settings(steps=2, batch_size=16, calibration_samples=32, precision="fp32")


def by_hand(hidden: np.ndarray, lengths: list[int], pooling: Pooling) -> np.ndarray:
    rows = []
    for row, length in zip(hidden, lengths, strict=True):
        mean = sum(row[:length]) / length if length else np.zeros(row.shape[1])
        vector = row[0] if pooling.mode == "cls" else mean
        norm = np.sqrt(sum(value * value for value in vector))
        rows.append(vector / norm if pooling.normalize and norm else vector)
    return np.array(rows)


class TestModel:
    @pytest.mark.parametrize("pooling", [Pooling("mean", True), Pooling("mean", False), Pooling("cls", True)], ids=str)
    def test_it_pools_real_tokens_alone(self, tmp_path: Path, pooling: Pooling) -> None:
        source = resolve(tiny.write_model("bert", tmp_path))
        torch.manual_seed(0)
        kind: Any = embedding_model("bert", pooling)
        model = kind.from_pretrained(source.path).eval()
        ids = torch.randint(5, 5 + len(tiny.WORDS), (4, 9))
        lengths = [9, 4, 1, 0]
        mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            actual = model(input_ids=ids, attention_mask=mask).embedding.numpy()
            added = model(
                input_ids=ids, attention_mask=((1.0 - mask.float()) * -1e4)[:, None, None, :]
            ).embedding.numpy()
        expected = by_hand(hidden.double().numpy(), lengths, pooling)
        np.testing.assert_allclose(actual, expected, atol=1e-6)  # float32 sums
        # Of a row without tokens, its first one says nothing: how attention spreads over padding differs by the mask's
        # kind.
        np.testing.assert_allclose(actual[:3], added[:3], atol=1e-5)
        assert np.isfinite(added).all()

    @pytest.mark.parametrize("mode", ["mean", "cls"])
    def test_half_precision_gives_no_nan(self, tmp_path: Path, mode: str) -> None:
        """Values whose sum and squares are beyond float16."""
        path = tiny.write_model("bert", tmp_path)
        kind: Any = embedding_model("bert", Pooling(mode, True))
        model = kind.from_pretrained(path).eval().half()
        with torch.no_grad():
            for block in model.bert.encoder.layer:
                block.output.LayerNorm.weight.mul_(2000.0)
            mask = torch.tensor([[1] * 40, [0] * 40])
            actual = model(input_ids=torch.full((2, 40), 7), attention_mask=mask).embedding
        assert torch.isfinite(actual).all()
        assert float(actual[0].norm()) == pytest.approx(1.0, abs=1e-3)

    @pytest.mark.parametrize("family", variants(FAMILIES, ("bert", "modernbert")))
    def test_weights_are_named_as_in_every_task_model(self, tmp_path: Path, family: str) -> None:
        path = tiny.write_model(family, tmp_path, head="embedding")
        config = read_config(path)
        assert str(entry_at(config, "architectures", 0)).endswith("Model")  # what other tools expect there
        assert task_at(path, config) == "embedding"
        state = load_task_model(path, TASK).state_dict()
        assert set(FAMILIES[family].weights(config)) <= set(state)

    def test_a_plain_sentence_transformers_directory_is_read_as_it_is(self, tmp_path: Path) -> None:
        """There, weights lack the prefix, and the encoder may have a pooler that embeddings do not use."""
        path = tiny.write_model("bert", tmp_path)
        write_pooling(path, Pooling("cls", False), tiny.HIDDEN, tiny.POSITIONS, path)
        weights = load_task_model(path, TASK).state_dict()
        name = "bert.encoder.layer.1.output.dense.weight"
        np.testing.assert_array_equal(read_tensor(path, name), weights[name].numpy())
        with pytest.raises(ArtifactError, match=r"bert\.encoder\.layer\.7\.x cannot be read"):
            read_tensor(path, "bert.encoder.layer.7.x")

    def test_a_classifier_with_such_files_beside_it_stays_one(self, tmp_path: Path) -> None:
        path = tiny.write_model("bert", tmp_path, head="classification")
        write_pooling(path, Pooling("mean", True), tiny.HIDDEN, tiny.POSITIONS, path)
        assert task_at(path, read_config(path)) == "classification"
        assert not has_head(path, read_config(path), TASK)


def embeddings(path: Path, texts: list[str]) -> np.ndarray:
    """Of a directory by our model, without activation quantizers, as others load it."""
    features = encode(load_tokenizer(path), Examples(texts, None, [0] * len(texts), "x"), 48, FAMILIES["bert"].inputs)
    batch = {name: torch.from_numpy(array) for name, array in pad(features, 0).items()}
    with torch.no_grad():
        return np.asarray(load_task_model(path, TASK)(**batch).embedding.numpy())


class TestOthersReadTheCompressedCheckpoint:
    TEXTS = ("a good film", "the very dull story of the actor", "plot")

    def test_transformers(self, tiny_checkpoint: Callable[..., Path]) -> None:
        from transformers import AutoModel, AutoTokenizer

        path = tiny_checkpoint("bert", task="embedding")
        model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
        with torch.no_grad():
            rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy() for text in self.TEXTS]
        expected = np.array([by_hand(row[None], [len(row)], Pooling("mean", True))[0] for row in rows])
        np.testing.assert_allclose(embeddings(path, list(self.TEXTS)), expected, atol=1e-6)  # float32, other batches

    def test_sentence_transformers(self, tiny_checkpoint: Callable[..., Path]) -> None:
        library = pytest.importorskip(
            "sentence_transformers", reason="sentence-transformers is not installed; pip install sentence-transformers"
        )
        path = tiny_checkpoint("bert", task="embedding")
        model = library.SentenceTransformer(str(path), device="cpu")
        assert model.max_seq_length == tiny.POSITIONS
        expected = model.encode(list(self.TEXTS))
        np.testing.assert_allclose(embeddings(path, list(self.TEXTS)), expected, atol=1e-6)  # float32, other batches


class TestData:
    def read(self, tmp_path: Path, text: str, split: str = "train") -> Any:
        file = tmp_path / "data.tsv"
        file.write_text(text, encoding="utf-8")
        return labelled(load_labelled(str(file), split, Columns(), TASK), TASK, None)

    def test_the_sentences_of_a_pair_are_two_samples_of_a_group(self, tmp_path: Path) -> None:
        examples = self.read(tmp_path, "sentence1\tsentence2\tscore\na\tb\t1\nc\td\t0.5\n", "dev")
        assert (examples.texts, examples.pairs, examples.groups) == (["a", "b", "c", "d"], None, [0, 0, 1, 1])
        assert examples.labels == [1.0, 1.0, 0.5, 0.5]

    @pytest.mark.parametrize("text", ["text\na\nb\n", "sentence\tlabel\na\t1\nb\t0\n"])
    def test_plain_sentences_train(self, tmp_path: Path, text: str) -> None:
        examples = self.read(tmp_path, text)
        assert (examples.texts, examples.groups) == (["a", "b"], None)
        assert np.isnan(examples.labels).all()
        with pytest.raises(DataError, match=r"data\.tsv: task embedding is scored on pairs of texts"):
            self.read(tmp_path, "sentence\tlabel\na\t1\nb\t0\n", "dev")

    def test_pairs_without_scores_train_and_are_no_dev_data(self, tmp_path: Path) -> None:
        text = "sentence1\tsentence2\na\tb\n"
        assert self.read(tmp_path, text).groups == [0, 0]
        with pytest.raises(DataError, match="none of the usual label columns"):
            self.read(tmp_path, text, "dev")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("a\tb\tnan", "label is missing"),
            ("a\tb\tinf", "not a finite number"),
            ("a\tb\tgood", "is not a finite number"),
            ("a\t \t1", "a text is empty"),
            ("\tb\t1", "a text is empty"),
        ],
    )
    def test_a_bad_row_is_named(self, tmp_path: Path, row: str, message: str) -> None:
        with pytest.raises(DataError, match=rf"data\.tsv:3: .*{message}"):
            self.read(tmp_path, f"sentence1\tsentence2\tscore\nx\ty\t1\n{row}\n", "dev")


class TestMetric:
    def test_it_is_the_rank_correlation_of_the_pairs_cosines(self) -> None:
        rng = np.random.default_rng(0)
        vectors, scores = rng.normal(size=(40, 5)), rng.random(20)
        groups = rng.permutation(np.repeat(np.arange(20), 2))
        labels = scores[groups]
        pairs = [[i for i in range(40) if groups[i] == group] for group in range(20)]
        cosine = [vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j]) for i, j in pairs]
        expected = spearmanr(cosine, scores).statistic
        assert metric_named("cosine_spearman", (), groups)(vectors, labels) == pytest.approx(expected, abs=1e-12)
        generator, values = np.random.default_rng(3), []
        for _ in range(1000):
            pick = generator.integers(0, 20, size=20)
            values.append(spearmanr(np.array(cosine)[pick], scores[pick]).statistic)
        actual = interval("cosine_spearman", vectors, labels, seed=3, groups=groups)
        assert actual == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1e-12)

    @pytest.mark.parametrize("groups", [None, np.array([0, 0, 0, 1]), np.array([0, 1, 2, 2])])
    def test_what_is_no_pair_is_refused(self, groups: Any) -> None:
        with pytest.raises(DataError, match="groups of exactly two samples"):
            metric_named("cosine_spearman", (), groups)(np.ones((4, 2)), np.ones(4))

    def test_nan_shows(self) -> None:
        vectors, groups = np.eye(4), np.array([0, 0, 1, 1])
        vectors[0, 0] = np.nan
        assert np.isnan(metric_named("cosine_spearman", (), groups)(vectors, np.array([0.0, 0.0, 1.0, 1.0])))


class TestAgreement:
    def test_the_loss_of_vectors_of_length_one_is_twice_one_minus_the_cosine(self) -> None:
        torch.manual_seed(0)
        teacher, student = (torch.nn.functional.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
        cosine = torch.nn.functional.cosine_similarity(teacher, student)
        assert float(vector_loss(student, teacher)) == pytest.approx(float((2 - 2 * cosine).mean()), rel=1e-5)
        assert divergence(teacher, student, "vector") == pytest.approx(float((2 - 2 * cosine).sum()), rel=1e-5)
        assert float(vector_loss(3 * teacher, teacher)) == pytest.approx(4.0, rel=1e-5)  # lengths count, too
        assert float(vector_loss(torch.zeros(1, 8), torch.zeros(1, 8))) == 0.0


class TestRefusals:
    def test_a_plain_encoder_is_no_embedding_model(self, tmp_path: Path) -> None:
        encoder, (train, dev) = tiny.write_model("bert", tmp_path / "m"), tiny.write_data(tmp_path, "embedding")
        with pytest.raises(ArtifactError, match="does not say how its tokens become one embedding"):
            finetune(encoder, task="embedding", train=str(train), dev=str(dev), out=tmp_path / "out", settings=TINY)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("changes", [{"recipe": "paper"}, {"distill": False}])
    def test_nothing_trains_without_a_teacher(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        path = tiny.write_model("bert", tmp_path / "m", head="embedding")
        (train, dev), source = tiny.write_data(tmp_path, "embedding"), resolve(path)
        plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"))
        with pytest.raises(DataError, match="trained by distillation alone"):
            compress(
                path, task="embedding", train=str(train), dev=str(dev), plan=plan, out=tmp_path / "out",
                settings=Settings(steps=2, **changes),
            )  # fmt: skip

    def test_the_papers_search_needs_scores(self, tmp_path: Path) -> None:
        path = tiny.write_model("bert", tmp_path / "m", head="embedding")
        train = tmp_path / "plain.tsv"
        train.write_text("text\n" + "".join(f"{word} film\n" for word in tiny.WORDS * 2), encoding="utf-8")
        settings = SearchSettings(
            candidate_specs=("2:4+W4", "dense"), compression=0.5, method="paper", samples=8, held_out=8
        )
        with pytest.raises(DataError, match="needs scored pairs to train on"):
            search(path, task="embedding", train=str(train), out=tmp_path / "out", settings=settings, training=TINY)


def test_a_plan_is_searched_from_plain_sentences(tmp_path: Path) -> None:
    path = tiny.write_model("bert", tmp_path / "m", head="embedding")
    train = tmp_path / "plain.tsv"
    train.write_text("text\n" + "".join(f"{a} {b}\n" for a in tiny.GOOD for b in tiny.BAD), encoding="utf-8")
    settings = SearchSettings(
        candidate_specs=("2:4+W4", "W8", "dense"), compression=0.8, samples=8, held_out=8, swaps=1
    )
    result = search(path, task="embedding", train=str(train), out=tmp_path / "out", settings=settings, training=TINY)
    assert result.best.joint is not None
    assert 0 < result.best.joint < 4  # 4 is the opposite direction
    assert len((tmp_path / "out" / "sensitivity.csv").read_text().splitlines()) == 1 + 2 * 12


def test_the_gate_on_the_cosine_holds_for_an_engine(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = tiny_checkpoint("bert", task="embedding")
    graph = export(checkpoint, tmp_path / "graph", max_length=32).path
    build_engine(graph, tmp_path / "engine", "ort")
    features = features_of(tmp_path / "engine", str(checkpoint.parent / "dev.tsv"), Columns())
    report = compare(checkpoint, tmp_path / "engine", features, gates=[parse_gate("cosine>=0.95")])
    (gate,) = report.gates
    assert gate.passed
    assert gate.actual is not None
    assert 0.95 < gate.actual <= 1.0 + 1e-6
    saved = np.load(tmp_path / "engine" / "outputs.npz")
    assert saved["groups"].tolist() == [i // 2 for i in range(2 * tiny.DEV_SAMPLES)]
    assert saved["labels"].tolist() == label_array(features).tolist()
    assert not check_gate(parse_gate("cosine>=1"), {"cosine": 0.9999}).passed  # this engine's is 1 but for 1e-14
    with pytest.raises(DataError, match="a gate on flips needs classes"):
        compare(checkpoint, tmp_path / "engine", features, gates=[parse_gate("flips<=1%")])


@pytest.mark.parametrize("target", variants(["trt8", "trt"], ("trt8",)))
def test_every_target_pools_in_float32(target: str, tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    graph = load_graph(export(tiny_checkpoint("bert", task="embedding"), tmp_path / "graph", target=target).path)
    assert graph.metadata_props["nxm.pooling"] == "mean, normalized"
    tail = [node for node in graph.graph if node.op_type in ("ReduceSum", "Sqrt", "Div")][-5:]
    assert [node.op_type for node in tail] == ["ReduceSum", "Div", "ReduceSum", "Sqrt", "Div"]
    assert {str(node.outputs[0].dtype) for node in tail} == {"FLOAT"}
    if target == "trt":
        pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed; pip install 'nxm-export[trt-rtx]'")
        passport = build_engine(tmp_path / "graph" / "model.onnx", tmp_path / "engine", "trt_rtx")
        assert passport.options["integer_products"] == 12


def test_the_model_is_loaded_with_its_pooling_for_training(tmp_path: Path) -> None:
    source = resolve(tiny.write_model("roberta", tmp_path, head="embedding"))
    outputs = load_model(source, TASK)(
        input_ids=torch.full((2, 5), 6), attention_mask=torch.ones(2, 5, dtype=torch.long), labels=torch.zeros(2)
    )
    assert outputs.loss is None
    assert outputs.logits is outputs.embedding
    shutil.rmtree(tmp_path / "1_Pooling")
    with pytest.raises(ArtifactError, match="1_Pooling"):
        load_model(source, TASK)
