"""What this project knows about model families and tasks: one entry each, and everything else follows from it.

A family says which matrices of a Hugging Face checkpoint are compressible, under which names, which of them read the
same tensor, and which inputs the model takes. A task says which head it has, how its outputs are shaped and how it is
scored. Both are read from ``config.json`` alone, so that a host without torch can use them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from nxm_export.contract.choices import PLACEMENT, STORAGE
from nxm_export.contract.config_checks import require_honoured
from nxm_export.contract.plan import INT8_ATTENTION, PLACEMENTS, CompressionPlan, WeightSpec
from nxm_export.errors import ArtifactError, PlanError, some

ROLES = ("query", "key", "value", "attention_output", "ffn_up", "ffn_down")
# GELU by its exact form (the error function) or by tanh: what ``config.json`` calls them, and other names for the same.
GELUS = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}
_TANH_GELUS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
# Where an output quantizer sits behind a linear layer. The FFN's first matrix has none of its own: what it writes goes
# through GELU, and the quantizer behind GELU is the input quantizer of the second matrix.
OUTPUT_ROLES = ("query", "key", "value", "attention_output", "ffn_down")


@dataclass(frozen=True)
class Family:
    """One Hugging Face ``model_type``.

    `base` is the encoder's attribute in a task model, `block` the module path of encoder block ``i`` inside it,
    `linears` the six compressible linear layers of a block by role, `words` the module path of the word-embedding
    table. The `*_key` fields name the sizes in ``config.json``.

    With `shared_keys`, the names of how many groups of blocks there are and how many blocks are in a group, the layers
    of the model share those groups (ALBERT), and `block` has ``{group}`` and ``{i}``: a block then runs more than once
    (`runs`), and a matrix has one weight, one input scale and one output scale for all of its uses.
    """

    model_type: str
    base: str
    block: str
    linears: Mapping[str, str]
    inputs: tuple[str, ...]
    layers_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    intermediate_key: str = "intermediate_size"
    heads_key: str = "num_attention_heads"
    activation_key: str = "hidden_act"
    attention_norm: str = (
        "attention.output.LayerNorm"  # what it writes is read by the FFN and by the residual around it
    )
    positions_after_padding: bool = False  # RoBERTa counts positions from pad_token_id + 1
    shared_keys: tuple[str, str] | None = None
    words: str = "embeddings.word_embeddings"
    embedding_key: str | None = None  # size of the table's rows, where it is not the hidden size

    def blocks(self, config: Mapping[str, object]) -> list[str]:
        """Module paths of the encoder blocks, each once, in the order in which they first run."""
        return list(dict.fromkeys(self.runs(config)))

    def runs(self, config: Mapping[str, object]) -> list[str]:
        """Module paths of the encoder blocks in the order in which they run; one that is shared stands there for every
        run."""
        layers = size_of(config, self.layers_key)
        if self.shared_keys is None:
            return [f"{self.base}.{self.block.format(i=i)}" for i in range(layers)]
        groups, inner = (size_of({key: 1, **config}, key) for key in self.shared_keys)
        if groups > layers:
            raise ArtifactError(
                f"config.json: {groups} {self.shared_keys[0]} for {layers} {self.layers_key}: a group would never run"
            )
        return [
            f"{self.base}.{self.block.format(group=int(layer / (layers / groups)), i=i)}"  # as transformers has it
            for layer in range(layers)
            for i in range(inner)
        ]

    def run_names(self, config: Mapping[str, object]) -> list[str]:
        """A name for every run of a block: its path, and for a block with several runs which of them (from 1)."""
        runs = self.runs(config)
        return [
            path if runs.count(path) == 1 else f"{path} (run {runs[: at + 1].count(path)})"
            for at, path in enumerate(runs)
        ]

    def linear(self, block: str, role: str) -> str:
        """Module path of one linear layer of a block."""
        return f"{block}.{self.linears[role]}"

    def weights(self, config: Mapping[str, object]) -> dict[str, tuple[int, int]]:
        """Every compressible parameter name with its shape (out, in), in the order in which the model runs them."""
        hidden, wide = size_of(config, self.hidden_key), size_of(config, self.intermediate_key)
        shapes = {"ffn_up": (wide, hidden), "ffn_down": (hidden, wide)}
        return {
            f"{self.linear(block, role)}.weight": shapes.get(role, (hidden, hidden))
            for block in self.blocks(config)
            for role in ROLES
        }

    @property
    def word_embedding(self) -> str:
        """Parameter name of the word-embedding table, (tokens, features)."""
        return f"{self.base}.{self.words}.weight"

    def word_embedding_shape(self, config: Mapping[str, object]) -> tuple[int, int]:
        """(tokens, features) of the word-embedding table."""
        return size_of(config, "vocab_size"), size_of(config, self.embedding_key or self.hidden_key)

    def role(self, weight: str) -> str:
        """The role of a weight of this family, such as ``ffn_up``."""
        for role, path in self.linears.items():
            if weight.endswith(f".{path}.weight"):
                return role
        raise PlanError(f"{weight} is not a compressible weight of the {self.model_type} family")

    def uniform_plan(
        self,
        config: Mapping[str, object],
        spec: WeightSpec,
        *,
        placement: str = PLACEMENT,
        keep_dense: Iterable[str] = (),
        residual: str = STORAGE,
        embedding: str = STORAGE,
    ) -> CompressionPlan:
        """The same pattern and bits for every weight but those that a `keep_dense` glob matches.

        `placement` is one of `PLACEMENTS`; ``ffn-only`` leaves attention's matrices their pattern and 16 bit.
        `residual` and `embedding` are as in `CompressionPlan`. A glob that hits nothing is a `PlanError`; so are a plan
        without a weight to compress and a pattern that an input size does not allow.
        """
        shapes = self.weights(config)
        weights = {name: self.placed(name, spec, placement) for name in shapes}
        for glob in keep_dense:
            hits = [name for name in shapes if fnmatchcase(name, glob)]
            if not hits:
                raise PlanError(
                    f"keep-dense rule {glob!r} matches none of the {len(shapes)} weights, such as {some(shapes)}"
                )
            weights.update(dict.fromkeys(hits, WeightSpec()))
        if all(chosen.is_dense for chosen in weights.values()):
            raise PlanError(
                "the plan leaves every weight dense, so there is nothing to compress; keep fewer of them dense"
            )
        attention = "int8" if placement in INT8_ATTENTION and spec.weight_bits else "float"
        plan = CompressionPlan(self.model_type, weights, shapes, attention, residual, embedding)
        self.require_placement(plan)
        return plan

    def placed(self, weight: str, spec: WeightSpec, placement: str) -> WeightSpec:
        """`spec` with the quantizers that `placement` gives this weight's role."""
        if placement not in PLACEMENTS:
            raise PlanError(f"unknown placement {placement!r}; choose one of {', '.join(PLACEMENTS)}")
        role = self.role(weight)
        if placement == "ffn-only" and role not in ("ffn_up", "ffn_down"):
            return WeightSpec(spec.pattern)
        behind = {"inputs": (), "products": OUTPUT_ROLES[:3]}.get(placement, OUTPUT_ROLES)
        outputs = spec.weight_bits and role in behind
        return replace(spec, output_bits=8 if outputs else None)

    def require_placement(self, plan: CompressionPlan) -> None:
        """Raise `PlanError` when a plan puts a quantizer where this family has no place for one, or leaves half of
        attention in float."""
        for name, spec in plan.weights.items():
            role = self.role(name)
            if spec.output_bits and role not in OUTPUT_ROLES:
                raise PlanError(
                    f"{name}: no output quantizer belongs between this layer and GELU; drop its output_bits"
                )
            if plan.attention == "int8" and role in OUTPUT_ROLES[:3] and not spec.output_bits:
                raise PlanError(
                    f"{name}: attention int8 needs output_bits 8 on every query, key and value; this one has none. "
                    "Quantize it, or plan attention float"
                )
        if plan.residual == "int8" and not any(spec.input_bits for spec in plan.weights.values()):
            raise PlanError("residual int8 shares the quantizers of the layers' inputs, and this plan has none")

    def gelu(self, config: Mapping[str, object]) -> str | None:
        """Which GELU the FFN has, ``erf`` or ``tanh``; None for another activation."""
        name = text_of(config, self.activation_key) or "gelu"
        return "tanh" if name in _TANH_GELUS else "erf" if name in ("gelu", "gelu_python") else None

    def heads(self, config: Mapping[str, object]) -> int:
        """Number of attention heads."""
        return size_of(config, self.heads_key)

    def max_positions(self, config: Mapping[str, object]) -> int:
        """Longest sequence, in tokens, that the position embeddings allow."""
        reserved = pad_id_of(config) + 1 if self.positions_after_padding else 0
        return size_of(config, "max_position_embeddings") - reserved


_BERT_LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
}
_DISTILBERT_LINEARS = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_output": "attention.out_lin",
    "ffn_up": "ffn.lin1",
    "ffn_down": "ffn.lin2",
}
_ALBERT_LINEARS = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "attention_output": "attention.dense",
    "ffn_up": "ffn",
    "ffn_down": "ffn_output",
}
_WITH_TYPES = ("input_ids", "attention_mask", "token_type_ids")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("bert", "bert", "encoder.layer.{i}", _BERT_LINEARS, _WITH_TYPES),
        Family("roberta", "roberta", "encoder.layer.{i}", _BERT_LINEARS, _WITH_TYPES[:2], positions_after_padding=True),
        Family(
            "distilbert",
            "distilbert",
            "transformer.layer.{i}",
            _DISTILBERT_LINEARS,
            _WITH_TYPES[:2],
            layers_key="n_layers",
            hidden_key="dim",
            intermediate_key="hidden_dim",
            heads_key="n_heads",
            activation_key="activation",
            attention_norm="sa_layer_norm",
        ),
        Family(
            "electra",
            "electra",
            "encoder.layer.{i}",
            _BERT_LINEARS,
            _WITH_TYPES,
            embedding_key="embedding_size",
        ),
        Family(
            "albert",
            "albert",
            "encoder.albert_layer_groups.{group}.albert_layers.{i}",
            _ALBERT_LINEARS,
            _WITH_TYPES,
            attention_norm="attention.LayerNorm",
            shared_keys=("num_hidden_groups", "inner_group_num"),
            embedding_key="embedding_size",
        ),
    )
}


def family_of(config: Mapping[str, object], *, source: str = "config.json") -> Family:
    """The family of a ``config.json``; families that are not supported are refused with the list of those that are,
    and so is what no family honours (`nxm_export.contract.config_checks`)."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ArtifactError(
            f"{source}: model_type {model_type!r} is not supported; supported families: {', '.join(FAMILIES)}"
        )
    if flag_of(config, "is_decoder") or flag_of(config, "add_cross_attention"):
        raise ArtifactError(f"{source}: decoders are not supported; only encoders of: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    require_honoured(config, family.activation_key, source)
    return family


def pad_id_of(config: Mapping[str, object]) -> int:
    """The id of padding in ``config.json``, 0 where it names none; `ArtifactError` when it is no integer."""
    value = config.get("pad_token_id")
    if value is not None and type(value) is not int:
        raise ArtifactError(f"config.json: pad_token_id must be an integer, got {value!r}; is the file complete?")
    return value or 0


def text_of(config: Mapping[str, object], key: str) -> str | None:
    """A text in ``config.json``, None where it is missing; `ArtifactError` when it is no text."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise ArtifactError(f"config.json: {key} must be a text, got {value!r}; is the file complete?")
    return value


def flag_of(config: Mapping[str, object], key: str) -> bool:
    """A truth value in ``config.json``, False where it is missing; `ArtifactError` when it is none."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ArtifactError(f"config.json: {key} must be true or false, got {value!r}; is the file complete?")
    return bool(value)


def size_of(config: Mapping[str, object], key: str) -> int:
    """A size in ``config.json``; `ArtifactError` when it is missing or no positive integer."""
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ArtifactError(f"config.json: {key} must be a positive integer, got {value!r}; is the file complete?")
    return value
