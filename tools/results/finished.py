"""What a finished checkpoint says on dev, and what a record takes from that and from its files."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from compressors.training.output_divergence import divergence
from nxm_export.contract.packed_checkpoint import pack
from nxm_export.contract.plan import CompressionPlan
from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics
from nxm_export.data.metrics import metric_named
from nxm_export.errors import DataError
from tools.results.bootstrap import resampled
from tools.results.records import Classes, Sizes, TrainingFacts, decode_classes, encode_classes, one_hot
from tools.results.statistics import percentiles


@dataclass(frozen=True)
class Answers:
    """What a finished checkpoint says on dev, and what is right; one character per sentence."""

    predictions: str
    labels: str
    classes: int

    @classmethod
    def of(cls, directory: Path) -> Answers:
        """Read them from beside the checkpoint's directory."""
        from safetensors.numpy import load_file

        file = outputs_file(directory)
        if not file.is_file():
            raise DataError(f"{file} is missing: what {directory} says on dev is not known; remove both")
        arrays = load_file(file)
        logits = arrays["logits"]
        return cls(encode_classes(logits.argmax(axis=-1)), encode_classes(arrays["labels"]), logits.shape[-1])

    def metric(self, name: str) -> float:
        """A metric by its name."""
        return metric_named(name)(one_hot(self.predictions, self.classes), self._right)

    def interval(self, name: str) -> tuple[float, float]:
        """Its 95 % bootstrap interval."""
        return percentiles(resampled(name, decode_classes(self.predictions), self._right, self.classes))

    @property
    def _right(self) -> Classes:
        return decode_classes(self.labels)


def outputs_file(directory: Path) -> Path:
    """Where what a model says on dev is kept: beside its directory."""
    return directory.with_name(f"{directory.name}.outputs.safetensors")


def divergences(dense: Path, checkpoint: Path) -> list[float]:
    """KL(dense || checkpoint) of the answer to every dev sentence, in nats."""
    from safetensors.torch import load_file

    reference, logits = (load_file(outputs_file(directory))["logits"] for directory in (dense, checkpoint))
    return [divergence(one, other) for one, other in zip(reference, logits, strict=True)]


def training_facts(metrics: CompressionMetrics) -> TrainingFacts:
    return TrainingFacts(
        qat_steps=metrics.qat_steps,
        held_out_samples=metrics.held_out_samples,
        outputs_in_float=dict(metrics.outputs_in_float) or None,
        admm=metrics.admm,
        admm_steps=metrics.admm_steps,
        residual=metrics.residual,
        residual_gate_passed=metrics.residual_gate_passed,
        sr_ste_steps=metrics.sr_ste_steps,
        permutation=metrics.permutation,
        embedding_table_drop=metrics.embedding_table_drop,
        embedding_table_drop_interval=metrics.embedding_table_drop_interval,
        more_text=metrics.more_text,
    )


def sizes(plan: CompressionPlan, checkpoint: Path) -> Sizes:
    """Of the planned matrices: FP32, stored (`packed`), in an INT8 engine; of the whole model: the file of ``nxm
    pack``."""
    with tempfile.TemporaryDirectory() as scratch:
        packed = pack(checkpoint, Path(scratch) / "packed.safetensors")
    return Sizes(
        fp32=4 * sum(out * in_ for out, in_ in plan.shapes.values()),
        packed=-(-plan.stored_bits("packed") // 8),
        engine_sparse=plan.engine_bytes(sparse=True),
        engine_dense=plan.engine_bytes(sparse=False),
        file=packed.file_bytes,
    )
