"""A small engine whose arithmetic is exact, so that padding and batching must not change a single bit.

``logits[b, c] = sum over s of mask[b, s] * (TABLE[ids[b, s], c] + types[b, s])``, with whole numbers in TABLE: float32
adds them exactly in any order, and padding adds zeros. With `work`, a product of two matrices of that size, all zeros
but known to be so only when it runs, is added: an engine that takes its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.base import BuildOptions
from engines.ort import backend as ort
from engines.parity.bisect_reports import BISECT_FILE, BisectReport, BlockParity
from engines.parity.bisect_reports import SCHEMA as BISECT_SCHEMA
from engines.parity.gates import GateResult
from engines.parity.reports import PARITY_FILE, SCHEMA, ParityReport
from engines.parity.tolerance import Expectation, compare_output
from engines.passport import companion_hashes, load_passport
from nxm_export.contract.io_spec import IOSpec
from nxm_export.storage.json_files import encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WORDS = ("good", "bad", "film", "plot", "a", "the", "not", "very")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
VOCABULARY = (*SPECIAL, *WORDS)
LABELS = ("negative", "positive")
MAX_LENGTH = 48
GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
exact (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask, int64[batch, sequence] token_type_ids)
    => (float[batch, 2] logits)
<int64[1] last = {2}, int64[1] along = {1}>
{
    rows = Gather <axis: int = 0> (table, input_ids)
    types = Cast <to: int = 1> (token_type_ids)
    types_3d = Unsqueeze (types, last)
    summed = Add (rows, types_3d)
    mask = Cast <to: int = 1> (attention_mask)
    mask_3d = Unsqueeze (mask, last)
    masked = Mul (summed, mask_3d)
    exact_logits = ReduceSum <keepdims: int = 0> (masked, along)
    WORK
}
"""
_NO_WORK = "logits = Identity (exact_logits)"
_WORK = """
    largest = ReduceMax <keepdims: int = 0> (mask)
    same = Sub (largest, largest)
    square = Expand (same, work_shape)
    product = MatMul (square, square)
    nothing = ReduceMax <keepdims: int = 0> (product)
    logits = Add (exact_logits, nothing)
"""


def token_values(seed: int = 0) -> np.ndarray:
    """(tokens, 2) whole numbers; another seed is another model."""
    return np.random.default_rng(seed).integers(-9, 10, (len(VOCABULARY), 2)).astype(np.float32)


def expected(feeds: dict[str, np.ndarray], seed: int = 0) -> np.ndarray:
    """The logits (batch, 2), by the formula."""
    summed = token_values(seed)[feeds["input_ids"]] + feeds["token_type_ids"][..., None]
    logits: np.ndarray = (summed * feeds["attention_mask"][..., None]).sum(axis=1).astype(np.float32)
    return logits


def feeds_of(lengths: Sequence[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random feeds (len(lengths), max(lengths)), row `i` with `lengths[i]` real tokens."""
    random = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths))
    mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int64)
    ids = random.integers(4, len(VOCABULARY), shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": random.integers(0, 2, shape) * mask}


def write_graph(out: Path, seed: int = 0, work: int = 0) -> Path:
    """A graph directory with its companions; returns the ONNX file."""
    import onnx

    out.mkdir(parents=True)
    graph = onnx.parser.parse_model(GRAPH.replace("WORK", _WORK if work else _NO_WORK))
    if work:
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array([work, work]), "work_shape"))
    graph.graph.initializer.append(onnx.numpy_helper.from_array(token_values(seed), "table"))
    onnx.checker.check_model(graph)
    onnx.save(graph, out / "model.onnx")
    limits = {"input_ids": len(VOCABULARY), "attention_mask": 2, "token_type_ids": 2}
    names = ("input_ids", "attention_mask", "token_type_ids")
    IOSpec("bert", "classification", names, {"logits": ("batch", "classes")}, LABELS, MAX_LENGTH, 0, limits).save(out)
    tokenizer().save(str(out / "tokenizer.json"))
    return out / "model.onnx"


def tokenizer() -> Tokenizer:
    """Words by the vocabulary, framed as BERT frames them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    made = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def build(out: Path, seed: int = 0, parity: bool | None = None, work: int = 0) -> Path:
    """An engine directory, with a parity report that says `parity` unless that is None."""
    onnx = write_graph(out.with_name(f"{out.name}-graph"), seed, work)
    out.mkdir()
    ort.build(onnx, out, BuildOptions(threads=1))
    if parity is not None:
        write_parity(out, passed=parity)
    return out


def write_parity(engine: Path, *, passed: bool) -> None:
    """A parity report beside an engine, of an output that is the checkpoint's, and one gate that held or failed."""
    passport = load_passport(engine)
    report = ParityReport(
        passed=passed,
        engine=str(engine),
        engine_sha256=passport.engine_sha256,
        backend="ort",
        samples=1,
        outputs=(compare_output("logits", Expectation(*[np.zeros((1, 2))] * 3), np.zeros((1, 2)), quantized=False),),
        metric="accuracy",
        reference_value=1.0,
        reference_interval=None,
        engine_value=1.0,
        engine_interval=None,
        reason="made up for a test",
        difference=0.0,
        difference_interval=None,
        probes=(),
        gates=(GateResult("drop<=0.5", 0.0 if passed else 1.0, 0.5, passed, "points"),),
        pairs=(),
        secondary_metrics={},
        contents_sha256=passport.contents_sha256,
    )
    (engine / PARITY_FILE).write_text(encode(report, SCHEMA), encoding="utf-8")


def write_bisect(engine: Path, *, passed: bool) -> None:
    """A bisection beside an engine, of one block that is the checkpoint's, or is not."""
    error, first = (0.0, None) if passed else (9.0, "layer.1")
    block = BlockParity(
        "layer.1", error, error, 1.0, None, error, error, None, 1.0, 1.0, 0.0, 0.0, passed=passed, reason="made up"
    )
    digest = load_passport(engine).engine_sha256
    report = BisectReport(passed, str(engine), digest, "ort", 1, 4, first, None, None, True, (block,), "made up")
    (engine / BISECT_FILE).write_text(encode(report, BISECT_SCHEMA), encoding="utf-8")


def cover(engine: Path) -> None:
    """Let the passport of an engine directory cover its companions as they are now, as if it was built with them."""
    replace(load_passport(engine), companions=companion_hashes(engine)).save(engine)
