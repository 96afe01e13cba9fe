"""``nxm run --dry-run``: what would be done, roughly how long, and how large the results are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import TYPE_CHECKING

from nxm_export.contract.checkpoint import float32_bytes
from nxm_export.contract.choices import INT4_BITS
from nxm_export.contract.plan import COUNTINGS, CompressionPlan
from nxm_export.contract.quantizer_placement import droppable_outputs
from nxm_export.data.label_kinds import classes_of, labelled, load_labelled, read_by_model
from nxm_export.data.more_text import read_more_text
from nxm_export.data.scorable import require_scorable_examples
from nxm_export.errors import notice
from nxm_export.pipeline.early_refusals import require_possible
from nxm_export.pipeline.plan_choice import PlanChoice, first_plan
from nxm_export.pipeline.run_engines import engines_of, graphs_of, run_backends
from nxm_export.pipeline.summary import kind_of

if TYPE_CHECKING:
    from compressors.models import ModelSource
    from compressors.settings import Settings
    from nxm_export.contract.tasks import Task
    from nxm_export.pipeline.request import Request

# Work of one training step in units of a plain forward and backward pass: the dense model once; the compressed model
# with fake quantization, and a forward pass of the teacher.
_COMPRESS_FACTOR = 1.9
# Work before the first step, in forward passes of a sample. Measured with MiniLM-L6 on two busy cores: calibration on
# 512 samples took 11 s, what outputs cost on 13 x 128 took 31 s, and second-order pruning on 512 took 45 s; layer-wise
# ADMM takes 2.2 times its processor time.
_CALIBRATION_FACTOR = 1.5
_OUTPUTS_FACTOR = 1.3
_SOLVER_PASSES = {"obs": 6.0, "obs-refit": 13.0, "admm": 13.0}  # over the calibration samples, the solving included
_SEARCH_SHARE = 0.1  # of a compression run, by which its number of samples is chosen
_SCORED = 2  # the dense and the compressed model, on the held-out samples
_WORDS_TO_TOKENS = 1.35  # of English under a BERT vocabulary
_SECONDS_PER_GRAPH = 12.0  # tracing, mostly
_PASSES = 4  # over the held-out data for every compared engine: itself and the reference, which runs in float64


@dataclass(frozen=True)
class RunEstimate:
    """What a run would do: samples, the plan, optimizer steps, seconds by stage, and bytes of what it writes.

    `dense_steps` is 0 where the model has a head for the task already. `search_seconds` are of a search for the plan,
    which then is not known: `plan` and `compression` are those of the request. `prepare_seconds` are of calibration,
    of what INT8 outputs cost, and of masks that are found before the first step. `other_seconds` are of export, build,
    comparison and timing. Seconds are good to a factor of two. `engines` are those that it would build, by name.
    `max_length` is the longest input in tokens; longer texts are cut. `more_texts` are those without labels.
    """

    train_samples: int
    dev_samples: int
    plan: Mapping[str, int]
    embedding: str
    compression: Mapping[str, float]
    dense_steps: int
    dense_seconds: float
    steps: int
    seconds: float
    other_seconds: float
    checkpoint_bytes: int
    fp32_onnx_bytes: int
    onnx_bytes: int
    prepare_seconds: float
    search_seconds: float
    engines: tuple[str, ...]
    max_length: int
    more_texts: int = 0

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        return asdict(self)


def estimate(request: Request, choice: PlanChoice = PlanChoice()) -> RunEstimate:
    """Samples, steps, seconds and bytes by stage; nothing is written.

    Data is read and the plan made, so that their mistakes show here. Seconds come from a matrix product timed on this
    machine.
    """
    from compressors.models import cut_notice, load_tokenizer, max_length, resolve
    from nxm_export.contract.tasks import task_named

    backends = run_backends(request.backends)
    source = resolve(request.model, request.revision)
    plan = first_plan(request, source, choice.file)
    require_possible(request, source, choice)
    graphs = graphs_of(backends, kind_of(plan))
    engines = engines_of(backends, kind_of(plan), [*graphs])
    task = task_named(request.task)
    texts, more, dev_samples, fits = _data(request, source, task)
    tokenizer = load_tokenizer(source)
    if (cut := cut_notice(source, tokenizer, task, request.settings.max_length)) is not None:
        notice(cut)
    longest = max_length(source, tokenizer, task, request.settings.max_length)
    settings, limit = request.settings, request.train_limit
    count = len(texts) if limit is None else min(len(texts), limit)
    tokens = min(longest, _mean_words(texts) * _WORDS_TO_TOKENS + 2)
    if request.more_text is not None:  # a little too much: before the first step no other text is read
        share, others = request.more_text.share, min(longest, _mean_words(more) * _WORDS_TO_TOKENS + 2)
        tokens = (1 - share) * tokens + share * others
    flops_per_sample = tokens * 2 * sum(out * in_ for out, in_ in plan.shapes.values())
    speed = _flops()
    step = settings.batch_size * flops_per_sample * 3 / speed  # forward once, backward twice
    dense_steps = 0 if fits else settings.dense_steps or round(settings.dense_epochs * count / settings.batch_size)
    steps = settings.steps if settings.steps is not None else round(settings.epochs * count / settings.batch_size)
    steps = steps if settings.trains else 0
    seconds, forward = steps * step * _COMPRESS_FACTOR, flops_per_sample / speed
    weights = float32_bytes(source.path)
    return RunEstimate(
        train_samples=count,
        dev_samples=dev_samples,
        plan=plan.pattern_counts,
        embedding=plan.embedding,
        compression={counting: plan.compression(counting) for counting in COUNTINGS},
        dense_steps=dense_steps,
        dense_seconds=round(dense_steps * step, 1),
        steps=steps,
        seconds=round(seconds, 1),
        other_seconds=round(
            len(graphs) * _SECONDS_PER_GRAPH + (len(engines) * _PASSES + _SCORED) * dev_samples * forward, 1
        ),
        checkpoint_bytes=2 * weights,
        fp32_onnx_bytes=weights,
        onnx_bytes=weights - saved_bytes(plan, source, request.weights_stored),
        prepare_seconds=round(forward * passes_before_training(settings, plan, count), 1),
        search_seconds=round(_SEARCH_SHARE * seconds, 1) if choice.search is not None else 0.0,
        engines=tuple(engine.name for engine in engines),
        max_length=longest,
        more_texts=len(more),
    )


def passes_before_training(settings: Settings, plan: CompressionPlan, samples: int) -> float:
    """Forward passes of a sample that the work before the first step is worth."""
    from compressors.training.output_sensitivity import SAMPLES

    calibrated = min(settings.calibration_samples, samples)
    passes = calibrated * _CALIBRATION_FACTOR * (1 if settings.trains else 2)
    outputs = sum(plan.weights[name].output_bits is not None for name in droppable_outputs(plan))
    if settings.output_limit is not None and outputs:
        passes += (outputs + 1) * min(SAMPLES, samples) * _OUTPUTS_FACTOR
    return passes + calibrated * _SOLVER_PASSES.get(settings.recipe, 0.0)


def _data(request: Request, source: ModelSource, task: Task) -> tuple[list[str], list[str], int, bool]:
    """(texts that are trained on, those without labels, held-out samples, whether the model has a head for the task);
    raises `DataError` for data that does not fit the task or the head."""
    fits = source.head_fits(task)
    head = source.classes() if fits else None
    texts_alone = fits and not request.settings.trains
    train = load_labelled(request.train, "train", request.columns, task, head, texts_alone=texts_alone)
    dev = load_labelled(request.scored_on, "dev", request.columns, task, head)
    classes = None
    if not texts_alone:
        classes = classes_of(train, task, head)
        labelled(train, task, classes)
    dev_classes = classes_of(dev, task, head) if fits else classes
    require_scorable_examples(
        task, labelled(dev, task, dev_classes), None if dev_classes is None else dev_classes.names
    )
    texts = [text if isinstance(text, str) else " ".join(text) for text in read_by_model(train, task)]
    more = list[str]()
    if request.more_text is not None:
        found = read_more_text(request.more_text, request.columns, task, train, dev)
        more = [" ".join(pair) for pair in zip(found.texts, found.pairs or repeat(""), strict=False)]
    return texts, more, len(dev.texts), fits


def _mean_words(texts: Sequence[str]) -> float:
    some = texts[:2000]
    return sum(len(text.split()) for text in some) / len(some)


def saved_bytes(plan: CompressionPlan, source: ModelSource, weights_stored: str) -> int:
    """How much smaller than FP32 the plan makes a graph: codes of 1 byte for floats of 4, or of half a byte."""
    saved = 0
    for name, spec in plan.weights.items():
        if spec.weight_bits:
            halved = weights_stored == "int4" and spec.weight_bits <= INT4_BITS
            saved += plan.shapes[name][0] * plan.shapes[name][1] * (7 if halved else 6) // 2
    if plan.embedding == "int8":
        tokens, features = source.family.word_embedding_shape(source.config)
        saved += tokens * (features * 3 - 4)  # and a scale per row
    return saved


def _flops() -> float:
    """Floating-point operations a second of a matrix product in the training precision, over a fifth of a second."""
    import torch

    from compressors.training.trainer import wants_bf16

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(768, 768, device=device, dtype=torch.bfloat16 if wants_bf16("auto") else torch.float32)
    a @ a
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < 0.2:
        float((a @ a)[0, 0])
        products += 1
    # Small layers, attention, norms and the optimizer keep training at about a quarter of a large product's speed.
    return 0.25 * products * 2 * 768**3 / (time.perf_counter() - began)
