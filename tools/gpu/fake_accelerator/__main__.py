"""Train on the fake accelerator: a tensor on the wrong device raises, and waits for the device are counted by line of
ours.

    python -m tools.gpu.fake_accelerator --step                        one step of a linear layer: does the device work?
    python -m tools.gpu.fake_accelerator RUN --recipe nxm --steps 30   a whole compression of a tiny BERT
    python -m tools.gpu.fake_accelerator RUN --interrupt-at 20         the same, stopped on the way and gone on with
    python -m tools.gpu.fake_accelerator RUN --search                  a search of a plan, with a round of short runs

RUN is a finished `nxm run`, for its tokenizer and its data. The model is random and tiny. The report is JSON, on stdout
or in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only

from nxm_export.progress import Progress, silent
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.hashing import file_hash
from tools import ROOT
from tools.gpu.fake_accelerator import NAME, CannotBuild, install

if TYPE_CHECKING:
    from compressors.settings import Settings
    from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics

WEIGHTS = "model.safetensors"

OURS, LIBRARIES = ("compressors", "nxm_export"), ("transformers", "accelerate", "optim")


@dataclass
class Rehearsal:
    """What was seen: the error that ended it, if any, and events by line, most frequent first."""

    schema: str = "nxm-fake-accelerator/1"
    torch: str = torch.__version__
    error: str | None = None
    trace: str | None = None
    metrics: dict[str, object] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)


def one_step() -> Rehearsal:
    """A step of a linear layer on the device, and a mismatch, which must raise."""
    device = torch.device(NAME, 0)
    layer = torch.nn.Linear(8, 4).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = layer.weight.detach().cpu()
    loss = layer(torch.ones(2, 8, device=device)).square().sum()
    loss.backward()
    optimizer.step()
    moved = float((layer.weight.detach().cpu() - before).abs().max())
    error: str | None
    try:
        layer(torch.ones(2, 8))
        error = "a CPU tensor among the device's did not raise"
    except RuntimeError as mismatch:
        error = None if "device mismatch" in str(mismatch) else str(mismatch)
    return Rehearsal(error=error, metrics={"loss": loss.item(), "moved": moved})


class Interrupted(Exception):
    """What stops a compression on its way, as a kill would."""


def compression(options: argparse.Namespace, work: Path) -> Rehearsal:
    """A compression of a tiny random BERT by `compressors.training.compress.compress`, where it is asked for stopped on
    its way and begun again."""
    from compressors.training.compress import compress
    from nxm_export.contract.families import family_of
    from nxm_export.contract.plan import WeightSpec
    from nxm_export.storage.json_files import to_json_object

    data, dense = options.data or options.run / "data", work / "dense"
    config = _write_model(options.run / "dense", dense)
    plan = family_of(config).uniform_plan(config, WeightSpec.parse(options.option), placement=options.placement)

    def stop(stage: str, done: int, _: int) -> None:
        if stage == options.interrupt_phase and done >= options.interrupt_at:
            raise Interrupted

    def run(out: Path, progress: Progress) -> CompressionMetrics:
        return compress(
            dense,
            task="classification",
            train=str(data / "train.tsv"),
            dev=str(data / "dev.tsv"),
            plan=plan,
            out=out,
            settings=_settings(options),
            train_limit=options.train_limit,
            progress=progress,
        )

    with _training_on(torch.device(NAME, 0)):
        metrics = to_json_object(run(work / "out", silent)) | {"weights": file_hash(work / "out" / WEIGHTS)}
        if options.interrupt_at:
            with suppress(Interrupted):
                run(work / "again", stop)
                raise RuntimeError(f"{options.interrupt_phase} has no step {options.interrupt_at} to stop at")
            run(work / "again", silent)
            metrics["weights of the resumed"] = file_hash(work / "again" / WEIGHTS)
    return Rehearsal(metrics=metrics)


def searching(options: argparse.Namespace, work: Path) -> Rehearsal:
    """A search of a plan for a tiny random BERT, its finalists judged by short runs."""
    from compressors.search.plan_search import search
    from compressors.search.settings import SearchSettings
    from nxm_export.storage.json_files import to_json_object

    data, dense, training = options.data or options.run / "data", work / "dense", _settings(options)
    _write_model(options.run / "dense", dense)
    halving = (2,) if training.trains else ()
    with _training_on(torch.device(NAME, 0)):
        result = search(
            dense,
            task="classification",
            train=str(data / "train.tsv"),
            out=work / "found",
            settings=SearchSettings(samples=16, held_out=16, swaps=2, halving=halving, finalists=2),
            training=training,
            train_limit=options.train_limit,
        )
    return Rehearsal(metrics=to_json_object(result))


def _settings(options: argparse.Namespace) -> Settings:
    from compressors.settings import Settings

    return Settings(
        recipe=options.recipe,
        steps=options.steps,
        batch_size=16,
        learning_rate=3e-4,
        augment=0.0,
        max_length=64,
        permute=options.permute,
        precision=options.precision,
        threads=1,
        calibration_samples=32,
    )


def _write_model(tokenizer: Path, out: Path) -> dict[str, object]:
    """A tiny random BERT in `out`, with this tokenizer; returns its configuration."""
    import transformers

    out.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, out)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(out)
    return dict(config.to_dict())


@contextmanager
def _training_on(device: torch.device) -> Iterator[None]:
    """Let the product and transformers' Trainer take this device for their accelerator."""
    import transformers
    from accelerate.state import PartialState

    state = PartialState(cpu=True)
    state._shared_state["device"] = device
    real_device = cast("Callable[[object], object]", vars(transformers.TrainingArguments)["device"].fget)

    def asked_device(arguments: object) -> torch.device:
        real_device(arguments)  # sets itself up
        state._shared_state["device"] = device
        return device

    with ExitStack() as stack:
        for target, value in (
            ("compressors.distributed.device", lambda: device),
            ("transformers.TrainingArguments.device", property(asked_device)),
            ("torch.save", _save_from_host(torch.save)),
        ):
            stack.enter_context(mock.patch(target, value))
        yield


def _save_from_host(save: Callable[..., None]) -> Callable[..., None]:
    """`torch.save`, which knows no storage of this device, for what it finds there."""

    def saved(value: object, *arguments: object, **keywords: object) -> None:
        save(tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), value), *arguments, **keywords)

    return saved


class Lines:
    """Counts events by the innermost line of ours, else of the libraries that we train with."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, event: str) -> None:
        stack = traceback.extract_stack()[:-1]
        ours = [frame for frame in stack if frame.filename.startswith(tuple(f"{ROOT / folder}/" for folder in OURS))]
        theirs = [frame for frame in stack if any(f"/{name}/" in frame.filename for name in LIBRARIES)]
        for frame in (ours or theirs)[-1:]:
            place = frame.filename.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]
            self.counts[f"{event}: {place}:{frame.lineno}  {(frame.line or '')[:90]}"] += 1
            return
        self.counts[f"{event}: elsewhere"] += 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu.fake_accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, nargs="?", help="a finished run directory, with dense/")
    parser.add_argument("--data", type=Path, help="directory with train.tsv and dev.tsv [RUN/data]")
    parser.add_argument("--step", action="store_true", help="only one step of a linear layer")
    parser.add_argument("--recipe", default="nxm")
    parser.add_argument("--placement", default="inputs")
    parser.add_argument("--option", default="2:4+W8")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--permute", action="store_true")
    parser.add_argument("--train-limit", type=int, help="samples of train to use [all]")
    parser.add_argument("--interrupt-at", type=int, metavar="STEP", help="compress again, stop there, and go on")
    parser.add_argument("--interrupt-phase", default="qat", metavar="PHASE")
    parser.add_argument("--search", action="store_true", help="search a plan in place of a compression")
    parser.add_argument("--out", type=Path, help="file for the report [stdout]")
    options = parser.parse_args(arguments)
    if options.run is None and not options.step:
        parser.error("give RUN, or --step")
    if options.run is not None and not (options.run / "dense").is_dir():
        parser.error(f"{options.run} has no dense/: give the directory of a finished run")
    try:
        extension = install()
    except CannotBuild as error:
        print(f"tools.gpu.fake_accelerator: {error}", file=sys.stderr)
        return 1
    lines = Lines()
    extension.listen(lines)
    with tempfile.TemporaryDirectory() as work:
        try:
            if options.step:
                rehearsal = one_step()
            else:
                rehearsal = (searching if options.search else compression)(options, Path(work))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:600]
            rehearsal = Rehearsal(error=text, trace=traceback.format_exc()[-3000:])
    extension.listen(None)
    rehearsal.events = dict(lines.counts.most_common(60))
    report = json.dumps(asdict(rehearsal), indent=1, default=str) + "\n"
    if options.out:
        write_atomic(options.out, report)
    else:
        print(report, end="")
    return 1 if rehearsal.error else 0


if __name__ == "__main__":
    sys.exit(main())
