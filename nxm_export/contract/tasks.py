"""The tasks that a model can have: head, outputs, labels and metric of each, in one entry; everything else follows from
it.

Read from ``config.json`` alone, so that a host without torch can use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nxm_export.errors import ArtifactError, PlanError


@dataclass(frozen=True)
class Task:
    """One kind of head, and the one place that says what is particular about it.

    `auto_class` is the transformers class, None for an encoder with a pooling behind it
    (`nxm_export.contract.pooling`), `outputs` the graph outputs with their axes, `label` the kind of label that its
    data has (`nxm_export.data.label_kinds.LABELS`), `metric` one of `nxm_export.data.metrics`. `output_kind` says what
    the first output means: ``softmax`` over the last axis, ``sigmoid`` of every entry, ``identity``, ``vector`` for a
    row that means something only as a whole, or ``span`` for two outputs, start and end, each with a softmax over the
    sequence; the distillation loss, the search's divergence and the decisions that parity counts follow from it.
    `problem_type` is transformers' word where several tasks share a class. `serves` names another task whose
    checkpoints have the very head that this one needs. Without `own_loss`, distillation alone trains: labels are for
    the metric. `texts` says how many texts a row of the model's input is: ``one``, ``two``, or ``any`` of both.
    `secondary_metrics` are given with the task's own.
    """

    name: str
    auto_class: str | None
    metric: str
    outputs: Mapping[str, tuple[str, ...]]
    label: str
    output_kind: str
    problem_type: str | None = None
    serves: str | None = None
    own_loss: bool = True
    texts: str = "any"
    secondary_metrics: tuple[str, ...] = ()

    @property
    def names_labels(self) -> bool:
        """True when the last axis of the first output has an entry for every label of the head."""
        return next(iter(self.outputs.values()))[-1] in ("classes", "labels", "scores")


_SEQUENCE, _TOKENS = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "classification",
            _SEQUENCE,
            "accuracy",
            {"logits": ("batch", "classes")},
            "class",
            "softmax",
            "single_label_classification",
            secondary_metrics=("f1", "mcc"),
        ),
        Task(
            "regression",
            _SEQUENCE,
            "pearson",
            {"logits": ("batch", "scores")},
            "score",
            "identity",
            "regression",
            secondary_metrics=("spearman",),
        ),
        Task(
            "multi-label",
            _SEQUENCE,
            "micro_f1",
            {"logits": ("batch", "labels")},
            "classes",
            "sigmoid",
            "multi_label_classification",
        ),
        Task(
            "token-classification",
            _TOKENS,
            "entity_f1",
            {"logits": ("batch", "sequence", "classes")},
            "tags",
            "softmax",
        ),
        Task(
            "embedding",
            None,
            "cosine_spearman",
            {"embedding": ("batch", "hidden")},
            "pair-score",
            "vector",
            own_loss=False,
            texts="one",
        ),
        # transformers has no word for ranking. Its loss for several labels, with one label, is the usual one of
        # cross-encoders.
        Task(
            "reranking",
            _SEQUENCE,
            "ndcg_at_10",
            {"logits": ("batch", "scores")},
            "relevance",
            "identity",
            "multi_label_classification",
            serves="regression",
            texts="two",
        ),
        Task(
            "question-answering",
            "AutoModelForQuestionAnswering",
            "squad_f1",
            {"start_logits": ("batch", "sequence"), "end_logits": ("batch", "sequence")},
            "answers",
            "span",
            texts="two",
            secondary_metrics=("exact_match",),
        ),
    )
}


def labels_of(config: Mapping[str, object]) -> tuple[str, ...]:
    """Class names of the head that a ``config.json`` describes, by index.

    transformers leaves ``id2label`` out for two classes without names of their own, and others for any number of them.
    Raises `ArtifactError` when the field is no map from 0, 1, 2, ... to names (texts, or whole numbers), or the number
    is none.
    """
    names = config.get("id2label")
    if names is None:
        count = config.get("num_labels")
        if count is not None and (type(count) is not int or count < 1):
            raise ArtifactError(f"config.json: num_labels must be a number of classes, got {count!r}")
        return tuple(f"LABEL_{i}" for i in range(2 if count is None else count))
    if not isinstance(names, Mapping) or {str(key) for key in names} != {str(i) for i in range(len(names))}:
        raise ArtifactError(f"config.json: id2label must map 0, 1, 2, ... to class names, got {names!r}")
    for key, name in names.items():
        if not isinstance(name, str) and type(name) is not int:
            raise ArtifactError(f"config.json: id2label: the name of class {key} must be a text, got {name!r}")
    by_index = {str(key): str(name) for key, name in names.items()}
    return tuple(by_index[str(i)] for i in range(len(by_index)))


def task_of(config: Mapping[str, object]) -> str | None:
    """The task of the head in a ``config.json``, or None when it has no head of a supported kind.

    A cross-encoder of others has one score and does not say what for: it counts as regression, which ``reranking``
    serves, too.
    """
    architecture = _architecture(config)
    matching = [
        task
        for task in TASKS.values()
        if task.auto_class and architecture.endswith(task.auto_class.removeprefix("AutoModel"))
    ]
    if len(matching) > 1:  # transformers has one class for them
        one, several = len(labels_of(config)) == 1, config.get("problem_type") == "multi_label_classification"
        if one:
            return "reranking" if several else "regression"
        return "multi-label" if several else "classification"
    return matching[0].name if matching else None


def _architecture(config: Mapping[str, object]) -> str:
    """The class that a ``config.json`` names, empty where it names none; `ArtifactError` when it is no text."""
    names = config.get("architectures")
    if names is None or names == []:
        return ""
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ArtifactError(
            f"config.json: architectures must be a list of class names, got {names!r}; is the file complete?"
        )
    return names[0]


def task_named(name: str) -> Task:
    """The task of this name, or `PlanError` with the list."""
    if name not in TASKS:
        raise PlanError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]
