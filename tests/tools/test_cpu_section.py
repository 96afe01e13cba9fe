"""The section of the CPU measurements says what its record says: ratios, its targets, and those that were missed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from nxm_export.contract.tasks import TASKS
from nxm_export.data.columns import Columns
from nxm_export.data.texts import read_texts
from tools import ROOT
from tools.benchmarks import cpu
from tools.benchmarks.cpu import OPENVINO, ORT
from tools.benchmarks.cpu_embeddings import write_pairs
from tools.benchmarks.cpu_profile import _integer_product, _milliseconds_alone, _planned_sizes
from tools.benchmarks.cpu_record import LatencyRow, Record, TextRecord, TextTimings
from tools.benchmarks.cpu_section import PEER, PEER_FIXED, float_span, section, summary
from tools.benchmarks.measuring import load_record


def latency(batch: int, sequence: int, over_float: float, over_peer: tuple[float, float, float]) -> LatencyRow:
    ratio, *interval = over_peer
    medians = {"FP32, ort": 20.0, "FP32, openvino": 22.0, ORT: 10.0, OPENVINO: 8.0, PEER: 8.5}
    return {
        "batch": batch,
        "sequence": sequence,
        "rounds": 30,
        "median_ms": medians,
        "quartiles_ms": {name: [value - 0.5, value + 0.5] for name, value in medians.items()},
        "ratios": {
            "ort over its own FP32": {"of": ORT, "against": "FP32, ort", "ratio": 2.0, "interval": [1.9, 2.1]},
            "our fastest over the best FP32": {
                "of": OPENVINO,
                "against": "FP32, ort",
                "ratio": over_float,
                "interval": [2.0, 3.0],
            },
            "our fastest over NNCF": {"of": OPENVINO, "against": PEER, "ratio": ratio, "interval": interval},
        },
    }


def test_fixed_shapes_and_loading_are_explained_where_they_were_measured(record: Record) -> None:
    plain = section(record)
    assert "*Fixed shapes*" not in plain
    for row in record["latency"]:
        row["median_ms"][PEER_FIXED], row["quartiles_ms"][PEER_FIXED] = 8.0, [7.5, 8.5]
    shown = section(record)
    assert "*Fixed shapes*" in shown
    assert f"| {PEER_FIXED} | – | 8.00 (7.50 to 8.50) |" in shown
    assert f"| {ORT} | 0.50 | 90 |" in shown


@pytest.fixture
def record() -> Record:
    rounds = {"INT8-2of4-ort arrival": [8.5, 8.5, 8.5], "INT8-2of4-ort bucketed": [5.7, 5.7, 5.7]}
    arrival: TextTimings = {
        "name": "INT8-2of4-ort",
        "order": "arrival",
        "padding": 0.3,
        "sentences_per_second": 100.0,
        "quartiles": (90.0, 110.0),
        "without_tokenisation": 120.0,
        "speedup": None,
        "interval": None,
    }
    text: TextRecord = {
        "sentences": 853,
        "batch": 32,
        "fixed": 128,
        "tokens": (27.3, 60),
        "tokenised_per_second": 20000.0,
        "rounds": 3,
        "timings": [
            arrival,
            {**arrival, "order": "bucketed", "sentences_per_second": 150.0, "speedup": 1.5, "interval": (1.4, 1.6)},
        ],
        "seconds": rounds,
    }
    return {
        "schema": cpu.SCHEMA,
        "machine": {"name": "a CPU", "features": "avx512_vnni", "threads": 2, "cores": 2},
        "load_average_before": 0.0,
        "versions": {"onnxruntime": "1.32.0"},
        "peer": "nncf 3.4.0, openvino 2026.4.1",
        "text_peers": "sentence-transformers 5.7.0",
        "model": {"model_type": "bert", "plan": {"2:4+W8": 36}, "compression": 0.84},
        "data_sha256": "0" * 64,
        "bytes": {"FP32, ort": 90_900_000, ORT: 59_200_000},
        "parity": [
            {
                "engine": ORT,
                "passed": False,
                "metric": "accuracy",
                "samples": 853,
                "checkpoint": 0.84,
                "value": 0.83,
                "difference_interval": (-0.02, 0.0),
                "agreement": 0.99,
                "mean_abs": 0.003,
                "mean_tolerance": 0.01,
            }
        ],
        "latency": [latency(1, 32, 2.5, (1.02, 0.99, 1.05)), latency(8, 128, 2.5, (0.96, 0.94, 0.98))],
        "loads": {ORT: {"seconds": 0.5, "bytes": 90_000_000}},
        "text": text,
        "embeddings": {
            "date": "2026-11-28",
            "machine": {"name": "a CPU", "threads": 2, "cores": 2},
            "commit": "0123456",
            "text": {**text, "seconds": {**rounds, "sentence-transformers, ONNX INT8": [11.4, 11.4, 11.4]}},
            "cosine": {"INT8-2of4-ort": 0.99, "sentence-transformers, ONNX INT8": 0.98},
            "peers": "sentence-transformers 5.7.0",
        },
        "profile": [
            {
                "engine": ORT,
                "batch": 1,
                "sequence": 32,
                "milliseconds": {"MatMulIntegerToFloat": 3.0, "Gelu": 1.0},
                "int8_gops": 400.0,
                "int8_gops_alone": 800.0,
            }
        ],
        "seconds": 300,
    }


def row_of(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_engine_is_in_the_table_with_its_size(record: Record) -> None:
    text = section(record)
    assert row_of(text, ORT + " |")[1:] == ["59.2", "10.00 (9.50 to 10.50)", "10.00 (9.50 to 10.50)"]
    assert row_of(text, PEER)[1] == "–"


def test_every_row_has_a_cell_for_every_column(record: Record) -> None:
    for block in section(record).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, block


def test_what_was_missed_is_said(record: Record) -> None:
    text = section(record)
    assert row_of(text, "ort >= 2x")[1:] == ["holds: 2.00", "holds: 2.00"]
    assert row_of(text, "our fastest >= 2.2x")[1:] == ["holds: 2.50 of 2.2", "MISSED: 2.50 of 3.0"]
    first, second = row_of(text, "time of our fastest over NNCF's <= 1.00")[1:]
    assert first.startswith("holds: 0.98")
    assert second.startswith("MISSED: 1.04 (1.02 to 1.06)")
    assert row_of(text, "time of our fastest over NNCF's <= 0.85")[1].startswith("MISSED: 0.98")
    assert row_of(text, ORT + " | 84.00")[-1] == "FAILED"


def test_without_peers_the_page_says_so(record: Record) -> None:
    record["peer"] = record["text_peers"] = None
    for row in record["latency"]:
        del row["ratios"]["our fastest over NNCF"]
    text = section(record)
    assert "time of our fastest over NNCF" not in text
    assert "NXM_TEXT_PEERS_PYTHON" in text


def test_the_speed_of_products_is_shown_with_their_own_peak_and_their_share(record: Record) -> None:
    assert row_of(section(record), "1x32 | 400")[1:] == ["400", "800", "50%", "75%"], "3 of 4 ms"
    del record["profile"][0]["int8_gops_alone"]
    assert row_of(section(record), "1x32 | 400")[1:] == ["400", "not measured", "–", "75%"]


def test_what_products_reach_alone_is_measured_for_the_sizes_of_the_engine(tmp_path: Path) -> None:
    onnx.save(_integer_product(np.ones((32, 64), np.int8)), tmp_path / "model.onnx")
    assert _planned_sizes(tmp_path) == {(32, 64): 1}
    assert _milliseconds_alone((32, 64), tokens=8, threads=1, rounds=3) > 0


def test_the_summary_names_the_slowest_and_the_fastest_shape(record: Record) -> None:
    text = summary(record)
    assert "MiniLM-L6 2.00 to 2.00 times as fast as FP32" in text
    assert "measured at 2 shapes" in text
    assert "between 4 % slower (8x128) and 2 % faster (1x32)" in text
    record["peer"] = None
    assert "slower" not in summary(record)


def test_the_page_on_gains_repeats_the_measured_span() -> None:
    record = load_record(cpu.FILE, Record)
    page = (ROOT / "docs" / "will-it-pay.md").read_text(encoding="utf-8")
    assert f"| INT8 in place of FP32 or FP16 | {float_span(record)} times as fast in ONNX Runtime" in page


def test_embeddings_of_one_model_stand_beside_those_of_peers_with_what_int8_changes(record: Record) -> None:
    page = section(record)
    assert row_of(page, "INT8-2of4-ort | bucketed | 0.9900")[3:] == ["150 (90 to 110)", "1.50 (1.40 to 1.60)"]
    assert "Measured\n2026-11-28 at commit 0123456." in page
    peers = row_of(page, "sentence-transformers, ONNX INT8")
    assert peers[2:4] == ["0.9800", "75 (75 to 75)"]
    assert peers[4] == "INT8-2of4-ort bucketed is 2.00 (1.00 to 2.00) times as fast"  # of three rounds


def test_peers_read_the_same_sentences_in_the_same_order(tmp_path: Path) -> None:
    data = tmp_path / "dev.tsv"
    data.write_text("sentence\tlabel\n" + "".join(f"film  number {i}\t{i % 2}\n" for i in range(5)), encoding="utf-8")
    pairs, sentences = write_pairs(data, tmp_path)
    ours = read_texts(str(pairs), Columns(), TASKS["classification"])
    assert [text for pair in ours for text in pair] == sentences.read_text(encoding="utf-8").splitlines()
    assert ours[1] == ("film number 2", "film number 3")
