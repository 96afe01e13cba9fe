"""A document of 8192 tokens through every stage, on a ModernBERT of the published sizes with few blocks: seconds and
peak memory of each stage, and what `nxm compare` finds.

    python -m tools.experiments.long_document            prints JSON; some minutes
    python -m tools.experiments.long_document --smoke    a tiny one, of 1024 tokens

Weights are random. Blocks are global, local, local, global. Every stage is the command of the user in a process of its
own, whose peak the kernel counts. Training text is short: compression without training reads nothing longer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from nxm_export.storage.json_files import as_objects
from tools import ROOT
from tools.benchmarks.servers import free_port, get
from tools.provenance import versions

BACKENDS = ("ort", "openvino")
START_SECONDS = 300.0


@dataclass(frozen=True)
class _Sizes:
    """Of the model, and of the document, in tokens."""

    hidden: int
    wide: int
    heads: int
    vocabulary: int
    tokens: int


WHOLE = _Sizes(768, 1152, 12, 50368, 8192)
SMOKE = _Sizes(32, 64, 4, 300, 1024)


class Stage(TypedDict):
    """A stage: seconds of its process, Python's start and imports among them, and its peak of resident memory."""

    stage: str
    seconds: float
    peak_gb: float


class Compared(TypedDict):
    """The verdict of `nxm compare` on an engine: whether it passed, and the mean difference of its outputs."""

    backend: str
    passed: bool
    difference: float
    tolerance: float


class Found(TypedDict):
    """The whole measurement."""

    tokens: int
    blocks: int
    hidden: int
    stages: list[Stage]
    compared: list[Compared]
    made_with: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = SMOKE if options.smoke else WHOLE
    if options.make:
        write_model(options.make, sizes)
        return
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(Path(scratch), sizes, smoke=options.smoke), indent=1))


def measure(scratch: Path, sizes: _Sizes, *, smoke: bool) -> Found:
    """Every stage in `scratch`, in the order of a user."""
    _write_data(scratch, sizes)
    own = [sys.executable, "-m", "tools.experiments.long_document", "--make", str(scratch / "model")]
    stages = [_run("make the model", [*own, "--smoke"] if smoke else own)[0]]

    def nxm(stage: str, *arguments: object) -> str:
        found, text = _run(stage, [sys.executable, "-m", "nxm_export", *map(str, arguments)])
        stages.append(found)
        return text

    model, checkpoint, data = scratch / "model", scratch / "checkpoint", scratch / "document.tsv"
    files = ("--train", scratch / "train.tsv", "--dev", scratch / "dev.tsv")
    # Without a length of its own `nxm compress` cuts at 512 tokens, and the checkpoint keeps that limit.
    nxm(
        "compress",
        "compress",
        model,
        *files,
        "--recipe=obs",
        "--steps",
        0,
        f"--max-length={sizes.tokens}",
        "--out",
        checkpoint,
    )
    nxm("export", "export", checkpoint, "--out", scratch / "graph")
    assert json.loads((scratch / "graph/spec.json").read_text(encoding="utf-8"))["max_length"] == sizes.tokens
    compared: list[Compared] = []
    for name in BACKENDS:
        engine = scratch / f"engine-{name}"
        nxm(f"{name}: build", "build", scratch / "graph", "--backend", name, "--out", engine)
        compared.append(
            _compared(
                name,
                nxm(f"{name}: compare", "compare", engine, f"--checkpoint={checkpoint}", f"--data={data}", "--json"),
            )
        )
        nxm(f"{name}: predict", "predict", engine, f"--data={data}", "--json")
        stages.append(_serve(name, engine, data, scratch / f"{name}.log"))
    return {
        "tokens": sizes.tokens,
        "blocks": 4,
        "hidden": sizes.hidden,
        "stages": stages,
        "compared": compared,
        "made_with": versions(("torch", "transformers", "onnxruntime", "openvino")),
    }


def write_model(out: Path, sizes: _Sizes) -> None:
    """A ModernBERT classifier with random weights, and a tokenizer of whole words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.wide,
        num_hidden_layers=4,
        num_attention_heads=sizes.heads,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        pad_token_id=0,
        classifier_pooling="mean",
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
    )
    transformers.ModernBertForSequenceClassification(config).save_pretrained(out)
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    words = special + [f"w{number}" for number in range(len(special), sizes.vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(out / "tokenizer.json"))
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), special, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": sizes.tokens, **names}
    (out / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _write_data(out: Path, sizes: _Sizes) -> None:
    """Short texts to compress on, and one document that is as long as the model takes."""
    rng = random.Random(0)

    def lines(counts: Sequence[int]) -> str:
        texts = (" ".join(f"w{rng.randrange(4, sizes.vocabulary)}" for _ in range(count)) for count in counts)
        return "sentence\tlabel\n" + "".join(f"{text}\t{at % 2}\n" for at, text in enumerate(texts))

    for file, counts in (("train", [60] * 64), ("dev", [60] * 16), ("document", [sizes.tokens])):
        (out / f"{file}.tsv").write_text(lines(counts), encoding="utf-8")


def _run(stage: str, command: Sequence[str]) -> tuple[Stage, str]:
    """(the stage, what it printed); raises `RuntimeError` with the end of its stderr where it fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        out.seek(0)
        err.seek(0)
        if status:
            raise RuntimeError(f"{stage} failed:\n{err.read().decode()[-3000:]}")
        return _stage(stage, seconds, usage.ru_maxrss), out.read().decode()


def _stage(name: str, seconds: float, peak_kilobytes: int) -> Stage:
    stage: Stage = {"stage": name, "seconds": round(seconds, 1), "peak_gb": round(peak_kilobytes * 1024 / 1e9, 2)}
    print(json.dumps(stage), file=sys.stderr, flush=True)  # a whole run takes minutes
    return stage


def _compared(name: str, text: str) -> Compared:
    [report] = as_objects(json.loads(text))
    [facts] = as_objects(report["outputs"])
    return {
        "backend": name,
        "passed": report["passed"] is True,
        "difference": float(str(facts["mean_abs"])),
        "tolerance": float(str(facts["mean_tolerance"])),
    }


def _serve(name: str, engine: Path, data: Path, log: Path) -> Stage:
    """`nxm serve` from its start to its answer for the document, and its end."""
    port, began = free_port(), time.perf_counter()
    # A document at a time, which takes longer than the 10 seconds that a request has.
    one = ["--text", "--instances", "1", "--max-batch-tokens", str(WHOLE.tokens)]
    one += ["--timeout-ms", str(int(START_SECONDS * 1000))]
    command = [sys.executable, "-m", "nxm_export", "serve", "--port", str(port), f"m={engine}", *one]
    with log.open("wb") as file:
        child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        try:
            _await(f"http://127.0.0.1:{port}", child.pid, log)
            _ask(f"http://127.0.0.1:{port}", data.read_text(encoding="utf-8").splitlines()[1].partition("\t")[0])
            seconds = time.perf_counter() - began
        finally:
            child.send_signal(signal.SIGTERM)
            _, _, usage = os.wait4(child.pid, 0)
    return _stage(f"{name}: serve", seconds, usage.ru_maxrss)


def _await(url: str, pid: int, log: Path) -> None:
    """Until the server is ready; raises `RuntimeError` with the end of its log where it ended instead."""
    deadline = time.monotonic() + START_SECONDS
    while get(f"{url}/v2/health/ready") != 200:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if ended or time.monotonic() > deadline:
            raise RuntimeError(f"nxm serve is not ready:\n{log.read_text(encoding='utf-8')[-2000:]}")
        time.sleep(0.2)


def _ask(url: str, text: str) -> None:
    body = {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v2/models/m_text/infer", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=START_SECONDS) as response:
        outputs = {output["name"]: output["data"] for output in json.load(response)["outputs"]}
    assert all(abs(number) < float("inf") for number in outputs["logits"]), outputs


if __name__ == "__main__":
    main()
