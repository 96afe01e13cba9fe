"""Measure `nxm serve` against other servers on this machine, and write the tables of docs/serving.md.

    python -m tools.benchmarks.serving ENGINE_DIR DATA_FILE [--seconds 5] [--rounds 5]
    python -m tools.benchmarks.serving --render          the tables again, from results/performance/serving.json

All servers run at the same time and are loaded in turn, in rounds whose order rotates, with the same sentences of their
true lengths; medians are reported. Every server gets one engine instance a core and one thread an instance. Beside the
wall clock stands the CPU time that the server's processes took for a request, which other work on the machine disturbs
less. Triton is the real server with a backend double (tools/benchmarks/servers.py); MLServer and the KServe SDK take
part when NXM_MLSERVER_VENV and NXM_KSERVE_VENV point at environments with them and onnxruntime.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from engines.base import LoadOptions, backend
from engines.benchmark.http_load import Client, ServedModel, run_round, with_text, with_tokens
from engines.devices import cpu_device
from engines.passport import load_passport
from engines.serving.repository import EngineSource
from engines.serving.settings import TritonOptions
from engines.triton import export_repository
from nxm_export.contract.io_spec import IOSpec, load_spec
from nxm_export.data.examples import Examples, encode, index_of, load_raw, with_classes
from nxm_export.data.features import Features, pad
from nxm_export.data.tokenization import load_tokenizer
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.json_files import encode as encode_json
from nxm_export.storage.json_files import read_record
from tools import ROOT
from tools.benchmarks.measuring import RECORDS
from tools.benchmarks.servers import Running, free_port, nxm_serve, started, triton, triton_venv
from tools.rendering import render, write_section

DOCUMENT, TOOL = ROOT / "docs" / "serving.md", "tools/benchmarks/serving.py"
RECORD, SCHEMA = RECORDS / "serving.json", "nxm-bench-serving/1"
PEERS = ROOT / "tools" / "experiments" / "serving_peers"
OURS, ALONE = "nxm serve", "nxm serve, no batching"
CLIENTS = (1, 8, 32)
DOUBLE = "Triton 2.51 core + Python ORT double"
PADDED = f"{DOUBLE}, clients pad to 8"
TOKENS = "Tokens, binary tensors"
TOKENS_JSON = "Tokens, JSON"
TEXT_JSON = "Sentences (tokenized by the server), JSON"


@dataclass
class Samples:
    """What one server gave, round by round, with one kind of requests and number of clients; times in milliseconds."""

    requests: str
    server: str
    clients: int
    throughput: list[float] = field(default_factory=list)
    p50: list[float | None] = field(default_factory=list)
    p99: list[float | None] = field(default_factory=list)
    cpu_ms: list[float | None] = field(default_factory=list)
    errors: int = 0


@dataclass(frozen=True)
class ServingRecord:
    """One measurement: where and of what, every server's rounds, and the protocol's overhead in milliseconds."""

    date: str
    cores: int
    cpu: str
    engine_sha256: str
    versions: dict[str, str]
    lengths: list[int]
    rounds: int
    seconds: float
    load: float
    samples: list[Samples]
    overhead_ms: dict[str, float]


@dataclass(frozen=True)
class Work:
    """The engine and the sentences that servers are asked about, shuffled."""

    engine: Path
    spec: IOSpec
    examples: Examples
    features: list[Features]

    @classmethod
    def of(cls, engine: Path, data: str) -> Work:
        """Read a data file; classes that the engine does not know are numbered."""
        spec, raw = load_spec(engine), load_raw(data, "dev")
        labels = spec.labels if set(raw.labels) <= set(spec.labels) else [str(i) for i in range(len(spec.labels))]
        examples = with_classes(raw, index_of(labels))
        examples = examples.subset(random.Random(0).sample(range(len(examples)), len(examples)))
        return cls(engine, spec, examples, encode(load_tokenizer(engine), examples, spec.max_length, spec.inputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--render", action="store_true", help="only write the document again, from the record")
    parser.add_argument("--print", action="store_true", help="print the tables, write nothing")
    options = parser.parse_args()
    if options.render:
        record = read_record(RECORD, ServingRecord, schema=SCHEMA, way_out="measure again")
    elif options.engine is None or options.data is None:
        parser.error("give ENGINE_DIR and DATA_FILE, or --render")
    else:
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            record = measure(Work.of(options.engine, options.data), options.seconds, options.rounds, scratch, stack)
    print(section(record), flush=True)
    if not options.print:
        write_atomic(RECORD, encode_json(record, SCHEMA))
        write_section(DOCUMENT, TOOL, section(record))


def measure(work: Work, seconds: float, rounds: int, scratch: Path, stack: contextlib.ExitStack) -> ServingRecord:
    """Start all servers, load them in turn; they stop with `stack`."""
    servers = start_servers(work.engine, scratch, stack)
    groups = requests_of(work, servers)
    samples: dict[tuple[str, str, int], Samples] = {}
    for number in range(rounds):
        for requests, targets in groups.items():
            for clients in CLIENTS:
                names = list(targets)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    into = samples.setdefault((requests, name, clients), Samples(requests, name, clients))
                    sample(targets[name], servers[name], seconds, into)
        print(f"round {number + 1} of {rounds}; load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    texts = {name: groups[TOKENS][name] for name in groups[TEXT_JSON]}
    return ServingRecord(
        date=time.strftime("%Y-%m-%d"),
        cores=len(os.sched_getaffinity(0)),
        cpu=cpu_device().get("name", "unknown"),
        engine_sha256=load_passport(work.engine).engine_sha256,
        versions={name: version(name) for name in ("onnxruntime", "uvicorn", "starlette")},
        lengths=[len(features["input_ids"]) for features in work.features],
        rounds=rounds,
        seconds=seconds,
        load=os.getloadavg()[1],
        samples=list(samples.values()),
        overhead_ms=protocol_overhead(work, texts, rounds),
    )


def start_servers(engine: Path, scratch: Path, stack: contextlib.ExitStack) -> dict[str, Running]:
    """Every server that this machine has, by name."""
    cores = len(os.sched_getaffinity(0))
    servers = {
        OURS: stack.enter_context(nxm_serve(scratch / "nxm", f"m={engine}", "--text")),
        ALONE: stack.enter_context(nxm_serve(scratch / "alone", f"m={engine}", "--merge", "1")),
    }
    venv = triton_venv()
    if isinstance(venv, Path):
        repository = scratch / "repository"
        export_repository(
            [EngineSource("m", "1", engine)], repository, TritonOptions(text=True, instances=cores, threads=1)
        )
        servers[DOUBLE] = stack.enter_context(triton(repository, scratch / "triton", venv))
        servers[PADDED] = servers[DOUBLE]
    for name, start in (("MLServer", mlserver), ("KServe SDK", kserve)):
        home = os.environ.get(f"NXM_{name.split()[0].upper()}_VENV")
        if home:
            running = stack.enter_context(start(Path(home), engine, scratch, cores))
            servers[f"{name} {_version(Path(home), name)}"] = running
    return servers


def requests_of(work: Work, servers: dict[str, Running]) -> dict[str, dict[str, ServedModel]]:
    """The requests of every kind to every server that takes them; Triton merges requests of equal shape only, so that a
    client that knows it pads."""
    features, spec = work.features, work.spec
    urls = {name: server.url for name, server in servers.items()}
    binary = [name for name in urls if name.startswith(("nxm", "Triton")) and name != PADDED]
    tokens = {name: with_tokens(name, urls[name], "m", features, spec) for name in binary}
    if PADDED in urls:
        tokens[PADDED] = with_tokens(PADDED, urls[PADDED], "m", features, spec, multiple=8)
    others = [name for name in urls if name not in (PADDED, ALONE)]
    texts = [name for name in (OURS, DOUBLE) if name in urls]
    return {
        TOKENS: tokens,
        TOKENS_JSON: {name: with_tokens(name, urls[name], "m", features, spec, encoding="json") for name in others},
        TEXT_JSON: {name: with_text(name, urls[name], "m_text", work.examples.texts) for name in texts},
    }


def sample(target: ServedModel, server: Running, seconds: float, into: Samples) -> None:
    """One round of one server, after a short warm-up."""
    run_round(target, into.clients, min(1.0, seconds / 4))
    before = cpu_seconds(server.process.pid)
    load = run_round(target, into.clients, seconds)
    used = cpu_seconds(server.process.pid) - before
    answers = len(load.latencies)
    into.throughput.append(answers / load.seconds)
    into.p50.append(
        float(np.percentile(load.latencies, 50)) * 1e3 if answers else None
    )  # a round may bring errors alone
    into.p99.append(float(np.percentile(load.latencies, 99)) * 1e3 if answers else None)
    into.cpu_ms.append(used / answers * 1e3 if answers else None)
    into.errors += sum(load.errors.values())
    if load.errors:
        print(f"{target.name}, {into.clients} clients: {dict(load.errors)}", file=sys.stderr, flush=True)


def protocol_overhead(work: Work, targets: dict[str, ServedModel], rounds: int) -> dict[str, float]:
    """Median extra milliseconds of a request over a bare loop that calls the engine with the same samples, one by one.

    Loop and servers take turns of 40 requests, so that a slow spell of the machine hits all of them.
    """
    features = work.features
    bare: list[float] = []
    served: dict[str, list[float]] = {name: [] for name in targets}
    with backend(load_passport(work.engine).backend).load(work.engine, LoadOptions(threads=1)) as loaded:
        for turn in range(10 * rounds):
            chosen = range(turn * 40 % (len(features) - 40), turn * 40 % (len(features) - 40) + 40)
            for i in chosen:
                began = time.perf_counter()
                loaded.run(pad([features[i]], work.spec.pad_id))
                bare.append(time.perf_counter() - began)
            for name, target in targets.items():
                served[name] += one_by_one(target, chosen)
    return {name: float(np.median(np.array(times) - np.array(bare))) * 1e3 for name, times in served.items()}


def one_by_one(target: ServedModel, indices: Sequence[int]) -> list[float]:
    """Seconds of each of these requests, on one connection."""
    times = []
    with Client(target) as client:
        for i in indices:
            began = time.perf_counter()
            status, _ = client.send(target.requests[i])
            times.append(time.perf_counter() - began)
            assert status == 200
    return times


def cpu_seconds(root: int) -> float:
    """User and system time of a process and of everything that it started and that still runs."""
    total, waiting = 0, [root]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
            for task in (process / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except FileNotFoundError:
            continue
    return total / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def mlserver(venv: Path, engine: Path, scratch: Path, instances: int) -> Iterator[Running]:
    home, port = scratch / "mlserver", free_port()
    home.mkdir()
    ports = {"http_port": port, "grpc_port": free_port(), "metrics_port": free_port()}
    (home / "settings.json").write_text(
        json.dumps({"host": "127.0.0.1", "parallel_workers": 0, "debug": False, **ports})
    )
    (home / "model-settings.json").write_text(json.dumps({"name": "m", "implementation": "mlserver_model.OrtModel"}))
    environment = _peer_environment(engine, instances) | {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    with started(
        [f"{venv}/bin/mlserver", "start", str(home)], environment, port, scratch / "mlserver.log", cwd=home
    ) as running:
        yield running


@contextlib.contextmanager
def kserve(venv: Path, engine: Path, scratch: Path, instances: int) -> Iterator[Running]:
    port = free_port()
    command = [f"{venv}/bin/python", str(PEERS / "kserve_model.py"), str(port)]
    with started(command, _peer_environment(engine, instances), port, scratch / "kserve.log", cwd=scratch) as running:
        yield running


def _peer_environment(engine: Path, instances: int) -> dict[str, str]:
    return {
        **os.environ,
        "NXM_MODEL": str((engine / load_passport(engine).engine).resolve()),
        "NXM_INSTANCES": str(instances),
        "PYTHONPATH": str(PEERS),
    }


def _version(venv: Path, name: str) -> str:
    (info,) = (venv / "lib").glob(f"python3.*/site-packages/{name.split()[0].lower()}-*.dist-info")
    return info.name.removesuffix(".dist-info").rpartition("-")[2]


def section(record: ServingRecord) -> str:
    """The tables of a record; the text stands in ``serving.md.j2``."""
    groups: dict[str, list[list[str]]] = {}
    for rows in record.samples:
        groups.setdefault(rows.requests, [])
    for requests in groups:
        groups[requests] = [
            _cells(rows)
            for clients in CLIENTS
            for rows in record.samples
            if rows.requests == requests and rows.clients == clients
        ]
    return render(
        "benchmarks/serving.md.j2",
        record=record,
        versions=", ".join(f"{name} {number}" for name, number in record.versions.items()),
        mean_length=float(np.mean(record.lengths)),
        longest=float(np.percentile(record.lengths, 95)),
        groups=groups,
        against=_against(record),
        overhead=[f"{name} {extra:.2f} ms" for name, extra in record.overhead_ms.items()],
    )


def _cells(rows: Samples) -> list[str]:
    middles = [_middle(rows.throughput, 0), _middle(rows.p50, 1), _middle(rows.p99, 1)]
    return [rows.server, str(rows.clients), *middles, f"{np.median(_floats(rows.cpu_ms)):.2f}", str(rows.errors)]


def _against(record: ServingRecord) -> list[list[str]]:
    """`nxm serve` against every other server, round by round: the median of the ratios of one round."""
    ours = {(rows.requests, rows.clients): rows for rows in record.samples if rows.server == OURS}
    order = list(dict.fromkeys((rows.requests, rows.server) for rows in record.samples if rows.server != OURS))
    samples = {(rows.requests, rows.server, rows.clients): rows for rows in record.samples}
    cells = []
    for requests, server in order:
        for clients in CLIENTS:
            mine, theirs = ours[requests, clients], samples[requests, server, clients]
            ratios = [
                _ratios(mine.throughput, theirs.throughput),
                _ratios(mine.p99, theirs.p99),
            ]
            cells.append([requests, server, str(clients), *(_middle(values, 2) for values in ratios)])
    return cells


def _ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float | None]:
    return [mine / other if mine is not None and other else None for mine, other in zip(ours, theirs, strict=True)]


def _middle(values: Sequence[float | None], digits: int) -> str:
    numbers = _floats(values)
    return f"{np.median(numbers):.{digits}f} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


if __name__ == "__main__":
    main()
