"""The data of one task, tokenized, with the classes that belong to the model's head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressors.models import ModelSource, cut_notice, max_length
from compressors.settings import Settings
from compressors.training.augmentation import without_label
from nxm_export.contract.config_values import size_of
from nxm_export.contract.no_answer import THRESHOLD, no_answer_threshold
from nxm_export.contract.records.checkpoint_metrics import MoreTextFacts
from nxm_export.contract.tasks import Task
from nxm_export.data.columns import Columns
from nxm_export.data.examples import Examples, RawExamples, encode, index_of
from nxm_export.data.features import Features, Label, split_indices
from nxm_export.data.label_kinds import (
    LABELS,
    Classes,
    classes_of,
    labelled,
    load_labelled,
    read_by_model,
    unlabelled,
)
from nxm_export.data.more_text import MoreText, read_more_text, text_hash
from nxm_export.data.question_answering import answering
from nxm_export.data.scorable import require_scorable_examples
from nxm_export.errors import ArtifactError, DataError, notice, some
from nxm_export.hf.protocols import FastTokenizer


@dataclass(frozen=True)
class TaskDataRequest:
    """Which data: files or names of train and, where there is one, dev; their columns; at most `train_limit` samples of
    train; what else is trained on, without labels. Train may be `texts_alone` where nothing learns from labels: samples
    without one then have NaN. `holds_out`: without dev, samples of train stand in its place, without their labels."""

    task: Task
    train: str
    dev: str | None = None
    columns: Columns = Columns()
    train_limit: int | None = None
    texts_alone: bool = False
    more_text: MoreText | None = None
    holds_out: bool = False


@dataclass(frozen=True)
class TaskData:
    """Training and evaluation data of one task, tokenized. `numbered`: labels are numbers, which are taken for indices
    of the head's `classes`. `no_answer_threshold` is what the model's contract will say
    (`nxm_export.contract.no_answer`). `more_text` are samples without labels. `dev_labelled`: answers to dev can be
    scored."""

    task: Task
    train: list[Features]
    dev: list[Features]
    pad_id: int
    classes: list[str] | None
    numbered: bool = False
    no_answer_threshold: float | None = None
    more_text: Sequence[Features] = ()
    more_text_facts: MoreTextFacts | None = None
    dev_labelled: bool = True

    @property
    def more_share(self) -> float:
        """Which share of what is trained on `more_text` makes up."""
        return 0.0 if self.more_text_facts is None else self.more_text_facts.share


def read_task_data(
    source: ModelSource, request: TaskDataRequest, tokenizer: FastTokenizer, settings: Settings
) -> TaskData:
    """Read and tokenize train and, if given, dev; class names come from the model's head where it fits, else from
    train. A model may give no answer when it could before, or when questions of train or dev have none.

    Sets the tokenizer's maximum length, which is saved with the model.
    """
    task, columns = request.task, request.columns
    if request.train_limit is not None and request.train_limit < 1:
        raise DataError(f"the train limit is a number of samples, at least 1; got {request.train_limit}")
    head = source.classes() if source.head_fits(task) else None
    raw = load_labelled(request.train, "train", columns, task, head, texts_alone=request.texts_alone)
    if request.texts_alone:  # the head's classes are known without labels
        classes = dev_classes = None if head is None else Classes(tuple(head), index_of(head))
        examples = unlabelled(raw.texts, raw.pairs, raw.source, task)
    else:
        classes = dev_classes = classes_of(raw, task, head)
        examples = labelled(raw, task, classes)
    if (cut := cut_notice(source, tokenizer, task, settings.max_length)) is not None:
        notice(cut)
    if task.label == "score" and head is not None and (behind := _score_activation(source)) is not None:
        notice(
            f"{source.path}: its config.json puts {behind} behind the score. Here scores are those before it, and "
            "training fits them to the labels by squared error, which changes their scale; --steps 0 (Settings.steps "
            "in Python) keeps it"
        )
    length = tokenizer.model_max_length = max_length(source, tokenizer, task, settings.max_length)

    scored = raw_dev = None
    if request.dev is not None:
        raw_dev = load_labelled(request.dev, "dev", columns, task, head if classes is None else classes.names)
        if not LABELS[task.label].separate and (raw.pairs is None) != (raw_dev.pairs is None):
            raise DataError(
                f"{raw.source} and {raw_dev.source} differ: only one of them has a second text; "
                "name the columns with --text-column and --pair-column"
            )
        _notice_shared_texts(raw, raw_dev, task)
        dev_classes = classes if head is None else classes_of(raw_dev, task, head)
        scored = labelled(raw_dev, task, dev_classes)
        require_scorable_examples(task, scored, None if dev_classes is None else dev_classes.names)
    threshold = _no_answer(source, task, None if request.texts_alone else examples, scored)
    if request.train_limit is not None:
        examples = examples.sample(request.train_limit, settings.seed)

    def tokens(examples: Examples) -> list[Features]:
        asked = answering(examples, threshold)
        return encode(tokenizer.backend_tokenizer, asked, length, source.family.inputs, says_cuts=True)

    more, facts = list[Features](), None
    if request.more_text is not None:
        others = read_more_text(request.more_text, columns, task, raw, raw_dev)
        more = [_without_label(sample, examples.labels[0]) for sample in tokens(others)]
        facts = MoreTextFacts(len(others), request.more_text.share, text_hash(others))
    train = tokens(examples)
    if request.texts_alone and LABELS[task.label].per_token:
        train = [_without_label(sample, []) for sample in train]
    held_out = [] if scored is None else tokens(scored)
    if scored is None and request.holds_out:
        train, held_out = _held_out(train, raw.source, settings.seed)
    names = None if classes is None else list(classes.names)
    numbered = any(found is not None and found.numbered for found in (classes, dev_classes))
    pad_id = int(tokenizer.pad_token_id or 0)
    data = TaskData(task, train, held_out, pad_id, names, numbered, threshold, more, facts, not request.holds_out)
    _require_rows(source, data, tokenizer)
    return data


def _score_activation(source: ModelSource) -> str | None:
    """What sentence-transformers computes of a cross-encoder's score, by what the model's configuration says in its new
    or its old form; None where it says nothing, or that nothing is."""
    own = source.config.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, Mapping) else None
    named = named or source.config.get("sbert_ce_default_activation_function")
    name = named.rpartition(".")[2] if isinstance(named, str) else ""
    return None if name in ("", "Identity") else name


_MOST_HELD_OUT = 512  # as many as tell divergences apart; the rest is for calibration


def _held_out(train: list[Features], source: str, seed: int) -> tuple[list[Features], list[Features]]:
    """(the samples that are left, those that answers are compared on), the latter without labels: a tenth, and at most
    `_MOST_HELD_OUT` and what completes their last group."""
    picked, left = split_indices(train, min(max(len(train) // 10, 1), _MOST_HELD_OUT), seed)
    if not left:
        raise DataError(
            f"{source}: one text is too little (one group, where texts are scored in groups): without dev data some "
            "are held out; give more"
        )
    notice(
        f"without dev data there is no score; how far answers are from the dense model's is measured on {len(picked)} "
        f"samples of {source}, which say too little where the model was trained on them"
    )
    return [train[i] for i in left], [_without_label(train[i], train[i]["labels"]) for i in picked]


def _without_label(sample: Features, like: Label | str) -> Features:
    """A sample of more text, with what stands for no label in place of one `like` those of the task."""
    label = sample["labels"]
    return {**sample, "labels": label if isinstance(label, str) else without_label(like, len(sample["input_ids"]))}


SHARED = 0.1  # of the dev texts: published data sets have a few twins


def _notice_shared_texts(train: RawExamples, dev: RawExamples, task: Task) -> None:
    """Say so where dev texts are trained on: their score is then no evidence for new texts."""
    known, judged = set(read_by_model(train, task)), read_by_model(dev, task)
    shared = sum(text in known for text in judged)
    if shared > SHARED * len(judged):
        notice(
            f"{dev.source}: {shared} of {len(judged)} texts are in {train.source}, too; a score on texts that a "
            "model was trained on says little about new ones"
        )


def _no_answer(source: ModelSource, task: Task, *parts: Examples | None) -> float | None:
    if task.output_kind != "span":
        return None
    stated = no_answer_threshold(source.config, str(source.path / "config.json"))
    unanswered = any(part is not None and not all(part.labels) for part in parts)
    return THRESHOLD if stated is None and unanswered else stated


def _require_rows(source: ModelSource, data: TaskData, tokenizer: FastTokenizer) -> None:
    """Raise `ArtifactError` where the tokenizer gives tokens, or kinds of tokens, that the model has no row for."""
    rows = size_of(source.config, "vocab_size")
    samples = (*data.train, *data.dev, *data.more_text)
    kinds = 1 + max(max(sample.get("token_type_ids", ()), default=0) for sample in samples)
    if source.config.get("type_vocab_size") and kinds > size_of(source.config, "type_vocab_size"):
        raise ArtifactError(
            f"{source.path}: its tokenizer tells {kinds} kinds of tokens apart, and the model (type_vocab_size) "
            f'{size_of(source.config, "type_vocab_size")}; set "model_input_names": ["input_ids", "attention_mask"] '
            "in tokenizer_config.json"
        )
    if max([data.pad_id, *(max(sample["input_ids"], default=0) for sample in samples)]) < rows:
        return
    beyond = {token for sample in samples for token in sample["input_ids"] if token >= rows} | (
        {data.pad_id} if data.pad_id >= rows else set()
    )
    words = some(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in beyond)
    raise ArtifactError(
        f"{source.path}: its tokenizer has {len(beyond)} tokens in this data that the model's table of {rows} "
        f"embeddings has not: {words}. Resize the model (resize_token_embeddings(len(tokenizer))) and train it, or "
        "take the tokens out of the tokenizer"
    )
