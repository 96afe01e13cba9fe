"""Measure `nxm serve` against other servers on this machine, and write the tables of docs/serving.md.

    python -m tools.benchmarks.serving ENGINE_DIR DATA_FILE [--seconds 5] [--rounds 5]

All servers run at the same time and are loaded in turn, in rounds whose order rotates, with the same sentences of their
true lengths; medians are reported. Every server gets one engine instance a core and one thread an instance. Beside the
wall clock stands the CPU time that the server's processes took for a request, which other work on the machine disturbs
less. Triton is the real server with a backend double (tools/benchmarks/servers.py); MLServer and the KServe SDK take part
when NXM_MLSERVER_VENV and NXM_KSERVE_VENV point at environments with them and onnxruntime.
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

from engines.base import backend
from engines.benchmark.http_load import Target, run_round, text_target, token_target
from engines.passport import cpu_device, load_passport
from engines.serving.repository import Source
from engines.triton import TritonOptions, export_repository
from nxm_export.contract.io_spec import load_spec
from nxm_export.data.examples import encode, load_raw, load_tokenizer, pad, with_classes
from tools.benchmarks.servers import Running, free_port, nxm_serve, started, triton, triton_venv

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- tools/benchmarks/serving.py: begin -->", "<!-- tools/benchmarks/serving.py: end -->"
CLIENTS = (1, 8, 32)
DOUBLE = "Triton 2.51 core + Python ORT double"
PADDED = f"{DOUBLE}, clients pad to 8"


@dataclass
class Samples:
    """What the rounds of one server at one number of clients gave."""

    throughput: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    errors: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("data")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--print", action="store_true", help="print the tables and leave the document alone")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tables = measure(options.engine, options.data, options.seconds, options.rounds, scratch, stack)
    print(tables, flush=True)
    if not options.print:
        text = DOCUMENT.read_text(encoding="utf-8")
        head, rest = text.split(BEGIN)
        DOCUMENT.write_text(f"{head}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def measure(engine: Path, data: str, seconds: float, rounds: int, scratch: Path, stack: contextlib.ExitStack) -> str:
    """The tables, in Markdown."""
    spec, cores = load_spec(engine), len(os.sched_getaffinity(0))
    raw = load_raw(data, "dev")
    labels = spec.labels if set(raw.labels) <= set(spec.labels) else [str(i) for i in range(len(spec.labels))]
    examples = with_classes(raw, labels)
    order = random.Random(0).sample(range(len(examples)), len(examples))
    examples = examples.subset(order)
    features = encode(load_tokenizer(engine), examples, spec.max_length, spec.inputs)
    lengths = [len(sample["input_ids"]) for sample in features]

    servers: dict[str, Running] = {
        "nxm serve": stack.enter_context(nxm_serve(scratch / "nxm", f"m={engine}", "--text"))
    }
    servers["nxm serve, no batching"] = stack.enter_context(nxm_serve(scratch / "alone", f"m={engine}", "--merge", "1"))
    venv = triton_venv()
    if isinstance(venv, Path):
        repository = scratch / "repository"
        export_repository([Source("m", "1", engine)], repository, TritonOptions(text=True, instances=cores, threads=1))
        servers[DOUBLE] = stack.enter_context(triton(repository, scratch / "triton", venv))
    for name, start in (("MLServer", mlserver), ("KServe SDK", kserve)):
        home = os.environ.get(f"NXM_{name.split()[0].upper()}_VENV")
        if home:
            servers[f"{name} {_version(Path(home), name)}"] = stack.enter_context(
                start(Path(home), engine, scratch, cores)
            )

    binary = [name for name in servers if name.startswith(("nxm", "Triton"))]
    texts = [name for name in ("nxm serve", DOUBLE) if name in servers]
    tokens = {n: token_target(n, servers[n].url, "m", features, spec) for n in binary}
    if DOUBLE in servers:  # Triton merges requests of equal shape only: what a client that knows it would send
        tokens[PADDED] = token_target(PADDED, servers[DOUBLE].url, "m", features, spec, multiple=8)
        servers[PADDED] = servers[DOUBLE]
    groups = {
        "Tokens, binary tensors": tokens,
        "Tokens, JSON": {n: token_target(n, servers[n].url, "m", features, spec, encoding="json") for n in servers if n != PADDED and "no batching" not in n},
        "Sentences (tokenized by the server), JSON": {n: text_target(n, servers[n].url, "m_text", examples.texts) for n in texts},
    }  # fmt: skip
    found: dict[tuple[str, str, int], Samples] = {}
    for number in range(rounds):
        for group, targets in groups.items():
            for clients in CLIENTS:
                names = list(targets)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    sample(
                        targets[name],
                        servers[name],
                        clients,
                        seconds,
                        found.setdefault((group, name, clients), Samples()),
                    )
        print(f"round {number + 1} of {rounds}; load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    overhead = protocol_overhead(engine, features, {n: groups["Tokens, binary tensors"][n] for n in texts}, rounds)
    return _document(engine, found, groups, overhead, seconds, rounds, lengths, cores)


def sample(target: Target, server: Running, clients: int, seconds: float, into: Samples) -> None:
    """One round of one server, after a short warm-up."""
    run_round(target, clients, min(1.0, seconds / 4))
    before = cpu_seconds(server.process.pid)
    found = run_round(target, clients, seconds)
    used = cpu_seconds(server.process.pid) - before
    into.throughput.append(len(found.latencies) / found.seconds)
    latencies = found.latencies if len(found.latencies) else np.array([np.nan])  # a round may bring errors alone
    into.p50.append(float(np.percentile(latencies, 50)) * 1e3)
    into.p99.append(float(np.percentile(latencies, 99)) * 1e3)
    into.cpu_ms.append(used / len(found.latencies) * 1e3 if len(found.latencies) else float("nan"))
    into.errors += sum(found.errors.values())
    if found.errors:
        print(f"{target.name}, {clients} clients: {dict(found.errors)}", file=sys.stderr, flush=True)


def protocol_overhead(
    engine: Path, features: Sequence[dict[str, list[int]]], targets: dict[str, Target], rounds: int
) -> dict[str, float]:
    """Median extra milliseconds of a request over a bare loop that calls the engine with the same samples, one by one.

    Loop and servers take turns of 40 requests, so that a slow spell of the machine hits all of them.
    """
    spec = load_spec(engine)
    bare: list[float] = []
    served: dict[str, list[float]] = {name: [] for name in targets}
    with backend(load_passport(engine).backend).load(engine, threads=1) as loaded:
        for turn in range(10 * rounds):
            chosen = range(turn * 40 % (len(features) - 40), turn * 40 % (len(features) - 40) + 40)
            for i in chosen:
                began = time.perf_counter()
                loaded.run(pad([features[i]], spec.pad_id))
                bare.append(time.perf_counter() - began)
            for name, target in targets.items():
                served[name] += one_by_one(target, chosen)
    return {name: float(np.median(np.array(times) - np.array(bare))) * 1e3 for name, times in served.items()}


def one_by_one(target: Target, indices: Sequence[int]) -> list[float]:
    """Seconds of each of these requests, on one connection."""
    import socket

    from engines.benchmark.http_load import exchange

    times = []
    with socket.create_connection((target.host, target.port), 30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in indices:
            began = time.perf_counter()
            status, _, _ = exchange(connection, target.requests[i])
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
    command = [f"{venv}/bin/python", str(ROOT / "tools/experiments/serving_peers/kserve_model.py"), str(port)]
    with started(command, _peer_environment(engine, instances), port, scratch / "kserve.log", cwd=scratch) as running:
        yield running


def _peer_environment(engine: Path, instances: int) -> dict[str, str]:
    return {
        **os.environ,
        "NXM_MODEL": str((engine / load_passport(engine).engine).resolve()),
        "NXM_INSTANCES": str(instances),
        "PYTHONPATH": str(ROOT / "tools" / "serving_peers"),
    }


def _version(venv: Path, name: str) -> str:
    (info,) = (venv / "lib").glob(f"python3.*/site-packages/{name.split()[0].lower()}-*.dist-info")
    return info.name.removesuffix(".dist-info").rpartition("-")[2]


def _document(
    engine: Path,
    found: dict[tuple[str, str, int], Samples],
    groups: dict[str, dict[str, Target]],
    overhead: dict[str, float],
    seconds: float,
    rounds: int,
    lengths: list[int],
    cores: int,
) -> str:
    passport = load_passport(engine)
    packages = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "uvicorn", "starlette"))
    lines = [
        f"Measured {time.strftime('%Y-%m-%d')} on {cores} cores ({cpu_device().get('name')}), engine {passport.engine_sha256[:12]}, {packages}. "
        f"{len(lengths)} sentences, {np.mean(lengths):.1f} tokens on average (95 % have at most {np.percentile(lengths, 95):.0f}); medians of "
        f"{rounds} interleaved rounds of {seconds:g} s, lowest to highest in brackets. Clients run on the same cores. "
        f"Load average of the machine at the end: {os.getloadavg()[1]:.1f}, of which this measurement is about 2.",
    ]
    for group, targets in groups.items():
        lines += ["", f"**{group}**", "", "| server | clients | answers / s | p50 ms | p99 ms | server CPU ms / answer | errors |", "|---|---|---|---|---|---|---|"]  # fmt: skip
        for clients in CLIENTS:
            for name in targets:
                s = found[group, name, clients]
                lines.append(
                    f"| {name} | {clients} | {_middle(s.throughput, 0)} | {_middle(s.p50, 1)} | {_middle(s.p99, 1)} "
                    f"| {np.median(s.cpu_ms):.2f} | {s.errors} |"
                )
    lines += ["", *_against(found, groups)]
    lines += ["", "Protocol overhead: what a request with binary tensors takes beyond a bare loop that runs the same engine on the same samples, one client, median: "]  # fmt: skip
    lines[-1] += ", ".join(f"{name} {extra:.2f} ms" for name, extra in overhead.items()) + "."
    return "\n".join(lines)


def _against(found: dict[tuple[str, str, int], Samples], groups: dict[str, dict[str, Target]]) -> list[str]:
    """`nxm serve` against every other server, round by round: the median of the ratios of one round."""
    lines = ["**`nxm serve` against the others**, median of the ratios within a round, lowest to highest", ""]
    lines += ["| requests | against | clients | throughput | p99 |", "|---|---|---|---|---|"]
    for group, targets in groups.items():
        for name in (name for name in targets if name != "nxm serve"):
            for clients in CLIENTS:
                ours, other = found[group, "nxm serve", clients], found[group, name, clients]
                ratios = [
                    [
                        mine / theirs if theirs else float("nan")
                        for mine, theirs in zip(getattr(ours, what), getattr(other, what), strict=True)
                    ]
                    for what in ("throughput", "p99")
                ]
                lines.append(f"| {group} | {name} | {clients} | {_middle(ratios[0], 2)} | {_middle(ratios[1], 2)} |")
    return lines


def _middle(values: list[float], digits: int) -> str:
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
