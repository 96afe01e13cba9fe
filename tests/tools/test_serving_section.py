"""The tables of docs/serving.md say what their record says: medians over rounds, ratios within a round, rounds of
errors alone."""

from __future__ import annotations

from nxm_export.storage.json_files import decode, encode
from tools.benchmarks.serving import ALONE, CLIENTS, OURS, SCHEMA, TEXT_JSON, TOKENS, Samples, ServingRecord, section


def rounds(requests: str, server: str, clients: int, *throughput: float) -> Samples:
    milliseconds: list[float | None] = [1000 / value for value in throughput]
    return Samples(requests, server, clients, list(throughput), milliseconds, milliseconds, milliseconds)


def record(*samples: Samples) -> ServingRecord:
    return ServingRecord(
        date="2026-01-02",
        cores=2,
        cpu="a CPU",
        engine_sha256="0123456789abcdef" * 4,
        versions={"onnxruntime": "1.2"},
        lengths=[5, 9, 13],
        rounds=3,
        seconds=5.0,
        load=2.25,
        samples=list(samples),
        overhead_ms={OURS: 0.4321},
    )


SAMPLES = [
    sample
    for clients in CLIENTS
    for sample in (
        rounds(TOKENS, OURS, clients, 100.0, 200.0, 400.0),
        rounds(TOKENS, ALONE, clients, 50.0, 200.0, 100.0),
        rounds(TEXT_JSON, OURS, clients, 10.0, 20.0, 40.0),
    )
]


def test_every_server_has_a_line_per_number_of_clients() -> None:
    text = section(record(*SAMPLES))
    assert text.startswith(
        "Measured 2026-01-02 on 2 cores (a CPU), engine 0123456789ab, onnxruntime 1.2. 3 sentences, 9.0 tokens"
    )
    tokens = text.split(f"**{TOKENS}**")[1].split("**")[0]
    assert f"| {OURS} | 8 | 200 (100 to 400) | 5.0 (2.5 to 10.0) | 5.0 (2.5 to 10.0) | 5.00 | 0 |" in tokens
    assert tokens.count(f"| {ALONE} |") == len(CLIENTS)
    assert text.endswith("median: nxm serve 0.43 ms.")


def test_ratios_are_those_within_a_round() -> None:
    against = section(record(*SAMPLES)).split("against the others**")[1]
    # 100/50, 200/200, 400/100: the median of the ratios, not the ratio of the medians
    assert f"| {TOKENS} | {ALONE} | 8 | 2.00 (1.00 to 4.00) | 0.50 (0.25 to 1.00) |" in against
    assert TEXT_JSON not in against  # no other server took those requests


def test_a_round_of_errors_alone_is_no_number() -> None:
    broken = Samples(TOKENS, ALONE, 8, [0.0], [None], [None], [None], errors=7)
    others = [sample for sample in SAMPLES if (sample.requests, sample.clients) != (TOKENS, 8)]
    text = section(record(rounds(TOKENS, OURS, 8, 100.0), broken, *others))
    assert f"| {ALONE} | 8 | 0 (0 to 0) | nan (nan to nan) | nan (nan to nan) | nan | 7 |" in text


def test_a_record_is_read_as_it_was_written() -> None:
    written = record(*SAMPLES)
    assert decode(encode(written, SCHEMA), ServingRecord, schema=SCHEMA, source="x", way_out="") == written
