"""Do an engine, its checkpoint and the other engines of a comparison belong together? Asked before anything is run.

What cannot be compared is refused by name here, so that a number is never about two different things.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from engines.passport import EnginePassport, PlanSummary
from nxm_export.contract.checkpoint import PLAN_FILE, open_checkpoint, read_config, weights_hash
from nxm_export.contract.families import family_of
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.no_answer import no_answer_threshold
from nxm_export.contract.plan import CompressionPlan
from nxm_export.contract.quantizer_placement import at_placement
from nxm_export.contract.tasks import TASKS, labels_of
from nxm_export.errors import ArtifactError


def plan_of(checkpoint: Path, directory: Path, passport: EnginePassport) -> CompressionPlan | None:
    """The checkpoint's plan as the engine's graph holds it, None for dense ones; `ArtifactError` where they do not
    belong together."""
    read_config(checkpoint)  # a directory of something else is refused as that, and not called a dense model
    compressed = (checkpoint / PLAN_FILE).is_file()
    if "placement" not in passport.graph:
        raise ArtifactError(
            f"{directory} was built from a graph that nxm-export did not make; it has no checkpoint to equal"
        )
    if compressed != (passport.plan is not None):
        kinds = {True: "a compressed model", False: "a dense model"}
        raise ArtifactError(
            f"{directory} was built from {kinds[not compressed]}, and {checkpoint} is {kinds[compressed]}; "
            "give the one it was exported from"
        )
    if passport.plan is None:
        return None
    whole = open_checkpoint(checkpoint).plan
    # A graph may hold the embedding table in float where the plan says INT8.
    embedding = passport.plan.embedding if whole.embedding == "int8" else "float"
    plan = replace(at_placement(whole, passport.graph["placement"]), embedding=embedding)
    if PlanSummary.of(plan) != passport.plan:
        raise ArtifactError(
            f"{directory} was built for the plan {passport.plan.options}, and {checkpoint} "
            f"has {plan.pattern_counts}; "
            "give the one it was exported from"
        )
    return plan


def require_from(checkpoint: Path, directory: Path, passport: EnginePassport, spec: IOSpec) -> None:
    """Raise `ArtifactError` unless the engine's family, labels and weights are the checkpoint's.

    The weights are compared by the hash that the exporter wrote into the graph; engines of older graphs do not say.
    """
    config = read_config(checkpoint)
    family = family_of(config, source=str(checkpoint))
    if spec.model_type != family.model_type:
        raise ArtifactError(
            f"{directory} is of the {spec.model_type} family, and {checkpoint} is {family.model_type}; "
            "give the one it was exported from"
        )
    labels = labels_of(config) if TASKS[spec.task].names_labels else ()
    if spec.labels != labels:
        raise ArtifactError(
            f"{directory} has the labels {list(spec.labels)}, and {checkpoint} has {list(labels)}; "
            "give the one it was exported from"
        )
    stated = no_answer_threshold(config, str(checkpoint)) if TASKS[spec.task].output_kind == "span" else None
    if spec.no_answer_threshold != stated:
        raise ArtifactError(
            f"{directory} has the threshold {spec.no_answer_threshold} for no answer, and {checkpoint} has {stated}; "
            "give the one it was exported from, or export and build again"
        )
    built = passport.graph.get("weights")
    if built is not None and built != (actual := weights_hash(checkpoint)):
        raise ArtifactError(
            f"{directory} was built from other weights (sha256 {built[:12]}...) than those of "
            f"{checkpoint} ({actual[:12]}...): "
            "engines of different checkpoints cannot be compared; give the one it was exported from"
        )


def require_outputs(directory: Path, spec: IOSpec, names: Sequence[str], what: str) -> None:
    """Raise `ArtifactError` unless `names`, the outputs that `what` has, are those of the engine's ``spec.json``."""
    if set(names) != set(spec.outputs):
        raise ArtifactError(
            f"{directory}: its spec names the outputs {', '.join(spec.outputs)}, and {what} has {', '.join(names)}; "
            "build it again from a new export"
        )


def require_alike(specs: Sequence[tuple[Path, IOSpec]]) -> None:
    """Raise `ArtifactError` unless engines that are compared with each other take and give the same, under the same
    names."""
    (first, expected), *rest = specs
    for directory, spec in rest:
        for what in ("task", "inputs", "outputs", "labels", "no_answer_threshold"):
            ours, theirs = getattr(expected, what), getattr(spec, what)
            if ours != theirs:
                raise ArtifactError(
                    f"{first} and {directory} cannot be compared: their {what} are {_shown(ours)} "
                    f"and {_shown(theirs)}; "
                    "compare them one by one, or build both from one checkpoint"
                )


def _shown(value: str | float | Iterable[str] | None) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)
