"""Which of a plan's activation quantizers a graph keeps.

Training places quantizers (`nxm_export.contract.encoder_family.Family.placed`); an export may leave some of them out,
because runtimes differ in what they make of them, and can never add one that was not trained.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from nxm_export.contract.encoder_family import GATED, RESIDUAL, ROTATED
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import GRAPH_PLACEMENTS, CompressionPlan, WeightSpec
from nxm_export.errors import PlanError


def placement_of(plan: CompressionPlan) -> str:
    """The fullest of `GRAPH_PLACEMENTS` that the plan trained."""
    if plan.attention == "int8":
        behind = [plan.weights[name] for name in residual_output_weights(plan) if plan.weights[name].weight_bits]
        return "products" if behind and not any(spec.output_bits for spec in behind) else "attention"
    if any(spec.output_bits for spec in plan.weights.values()):
        return "inputs-outputs"
    return "inputs" if any(spec.weight_bits for spec in plan.weights.values()) else "float"


def at_placement(plan: CompressionPlan, placement: str) -> CompressionPlan:
    """The plan that a graph of this placement (one of `GRAPH_PLACEMENTS`) holds.

    ``float`` keeps the baked weights (those of the embedding table, too) and nothing else, ``inputs`` the pairs before
    the planned products, ``inputs-outputs`` also those behind them (and on the residual, where it is planned),
    ``products`` those before every product, the two inside attention included, ``attention`` all of these. Raises
    `PlanError` for a placement that the plan was not trained for: quantizers can be dropped, never added.
    """
    if placement not in GRAPH_PLACEMENTS:
        raise PlanError(f"unknown placement {placement!r}; choose one of {', '.join(GRAPH_PLACEMENTS)}")
    if placement == "float":
        floats = {
            name: replace(spec, weight_bits=None, input_bits=None, output_bits=None)
            for name, spec in plan.weights.items()
        }
        return replace(plan, weights=floats, attention="float", residual="float", embedding="float")
    if placement == "inputs":
        inputs = {name: replace(spec, output_bits=None) for name, spec in plan.weights.items()}
        return replace(plan, weights=inputs, attention="float", residual="float")
    trained = placement_of(plan)
    if placement in ("products", "attention"):
        if plan.attention != "int8":
            raise PlanError(
                f"this plan trained attention in float; use placement {trained}, or compress again with {placement}"
            )
        if placement == "products":
            dropped = {name: replace(plan.weights[name], output_bits=None) for name in droppable_outputs(plan)}
            return replace(plan, weights={**plan.weights, **dropped})
        if trained == "products":
            raise PlanError(
                "this plan trained no quantizers behind the products; use placement products, or compress again with "
                "attention"
            )
        return plan
    quantized = [spec for spec in plan.weights.values() if spec.weight_bits]
    if trained == "products" or (quantized and not any(spec.output_bits for spec in quantized)):
        raise PlanError(
            "this plan trained no output quantizers; use placement inputs, or compress again with inputs-outputs"
        )
    return replace(plan, attention="float")


def residual_output_weights(plan: CompressionPlan) -> list[str]:
    """The planned weights whose results go into a residual connection and nowhere else."""
    family = FAMILIES[plan.model_type]
    return [name for name in plan.weights if family.linear(name).writes == RESIDUAL]


def droppable_outputs(plan: CompressionPlan) -> list[str]:
    """The planned weights whose output quantizers can be left out: all but those of what attention multiplies. A fused
    matrix that writes something of both kinds can lose its where attention is in float."""
    family, int8_attention = FAMILIES[plan.model_type], plan.attention == "int8"
    linears = {name: family.linear(name) for name in plan.weights}
    return [
        name
        for name, linear in linears.items()
        if linear.writes in (RESIDUAL, ROTATED, GATED) and not (int8_attention and linear.operands)
    ]


def planned_spec(plan: CompressionPlan, name: str) -> WeightSpec | None:
    """What is planned for a matrix of a graph, by its name there: one of the plan's, or a part of a fused one."""
    if name in plan.weights:
        return plan.weights[name]
    whole = f"{name.removesuffix('.weight').rpartition('.')[0]}.weight"
    return plan.weights[whole] if whole in plan.weights and name in _parts(plan, whole) else None


def names_in_graph(plan: CompressionPlan, name: str, present: Container[str]) -> tuple[str, ...]:
    """The names of the planned matrix `name` in a graph with the matrices `present`: its own, or those of its parts
    where any of them is there."""
    parts = _parts(plan, name)
    return parts if name not in present and any(part in present for part in parts) else (name,)


def _parts(plan: CompressionPlan, name: str) -> tuple[str, ...]:
    """The parts of a planned matrix, or its own name; a plan in a foreign graph may be for what is not known here."""
    try:
        return FAMILIES[plan.model_type].parts(name)
    except (KeyError, PlanError):
        return (name,)
