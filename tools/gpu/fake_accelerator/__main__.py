"""Train on the fake accelerator: a tensor on the wrong device raises, and waits for the device are counted by line of
ours.

    python -m tools.gpu.fake_accelerator --step                        one step of a linear layer: does the device work?
    python -m tools.gpu.fake_accelerator RUN --recipe nxm --steps 30   a whole compression of a tiny BERT

RUN is a finished `nxm run`, for its tokenizer and its data. The model is random and tiny; checkpoints are not written,
for torch.save knows no storage of this device. The report is JSON, on stdout or in ``--out``.
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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast
from unittest import mock

import torch

from nxm_export.storage.atomic import write_atomic
from tools import ROOT
from tools.gpu.fake_accelerator import NAME, CannotBuild, install

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


def compression(options: argparse.Namespace, work: Path) -> Rehearsal:
    """A compression of a tiny random BERT by `compressors.training.compress.compress`."""
    from compressors.settings import Settings
    from compressors.training.compress import compress
    from nxm_export.contract.families import family_of
    from nxm_export.contract.plan import WeightSpec
    from nxm_export.storage.json_files import to_json_object

    data = options.data or options.run / "data"
    dense = work / "dense"
    _write_model(options.run / "dense", dense)
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    plan = family_of(config).uniform_plan(config, WeightSpec.parse(options.option), placement=options.placement)
    settings = Settings(
        recipe=options.recipe,
        steps=options.steps,
        batch_size=16,
        learning_rate=3e-4,
        augment=0.0,
        max_length=64,
        precision="fp32",
        threads=1,
        calibration_samples=32,
    )
    with _training_on(torch.device(NAME, 0)):
        metrics = compress(
            dense,
            task="classification",
            train=str(data / "train.tsv"),
            dev=str(data / "dev.tsv"),
            plan=plan,
            out=work / "out",
            settings=settings,
        )
    return Rehearsal(metrics=to_json_object(metrics))


def _write_model(tokenizer: Path, out: Path) -> None:
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
            ("transformers.TrainingArguments.n_gpu", property(lambda _: 1)),
            ("transformers.Trainer._save_checkpoint", _save_nothing),
        ):
            stack.enter_context(mock.patch(target, value))
        yield


def _save_nothing(trainer: object, *_: object, **__: object) -> None:
    arguments, step = trainer.args, trainer.state.global_step  # type: ignore[attr-defined]
    Path(arguments.output_dir, f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)


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
    parser.add_argument("--out", type=Path, help="file for the report [stdout]")
    options = parser.parse_args(arguments)
    if options.run is None and not options.step:
        parser.error("give RUN, or --step")
    try:
        extension = install()
    except CannotBuild as error:
        print(f"tools.gpu.fake_accelerator: {error}", file=sys.stderr)
        return 1
    lines = Lines()
    extension.listen(lines)
    with tempfile.TemporaryDirectory() as work:
        try:
            rehearsal = one_step() if options.step else compression(options, Path(work))
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
