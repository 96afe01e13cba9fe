"""The description of an encoder family: the linear layers of a block, what they read and write, and its attention.

`nxm_export.contract.families` has an entry of this form for every family that is supported. It says nothing about how a
model is trained, exported or run; those stages read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from nxm_export.contract.choices import PLACEMENT, STORAGE
from nxm_export.contract.config_values import pad_id_of, size_of, text_of
from nxm_export.contract.plan import INT8_ATTENTION, PLACEMENTS, CompressionPlan, WeightSpec
from nxm_export.errors import ArtifactError, PlanError, some

# GELU by its exact form (the error function) or by tanh: what ``config.json`` calls them, and other names for the same.
GELUS = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}
_TANH_GELUS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")

# What a linear layer reads: the tensors of a block that linear layers share. Layers that read one tensor share its
# quantizer.
BLOCK, CONTEXT, FFN, WIDE = "block", "context", "ffn", "wide"
# What reads a linear layer's result. An ``operand`` is one of the three that attention multiplies, as it is;
# ``residual`` is added to the residual stream; ``rotated`` is a query or key that is rotated first, ``gated`` one of
# two that are multiplied in a gated FFN. All of these can leave the product in INT8. ``inside`` cannot: GELU comes
# next, which the product's kernel computes on its way out, and the quantizer belongs behind that.
OPERAND, RESIDUAL, ROTATED, GATED, INSIDE = "operand", "residual", "rotated", "gated", "inside"
OPERANDS = ("query", "key", "value")  # of attention's two products


@dataclass(frozen=True)
class Part:
    """Some rows of a fused matrix, and so some channels of what it writes; `writes` is as in `Linear`."""

    name: str
    writes: str


@dataclass(frozen=True)
class Linear:
    """One compressible linear layer of a block.

    `role` names it in tables and in candidate rules, `path` is its module inside the block, `out` and `in_` name its
    sizes (see `Family.sizes`), `reads` and `writes` are as above. A fused matrix has `parts`, of as many rows each, in
    the order of its rows; it is one matrix for training and in plans, and one product or one for each part in a graph.
    """

    role: str
    path: str
    out: str
    in_: str
    reads: str
    writes: str
    parts: tuple[Part, ...] = ()

    @property
    def operands(self) -> tuple[str, ...]:
        """Which of attention's `OPERANDS` it writes, as they are multiplied."""
        if self.parts:
            return tuple(part.name for part in self.parts if part.writes == OPERAND)
        return (self.role,) if self.writes == OPERAND else ()


@dataclass(frozen=True)
class Attention:
    """How the blocks of a family attend.

    `path` is the module inside a block whose operands are multiplied. With `interface` it takes the attention functions
    of transformers; without, it multiplies by itself, and there is no fused kernel to ask for. Quantizers reach its
    probabilities then only in front of `dropout`, a module inside it that reads them. `takes_bias_mask` says that a
    (batch, 1, 1, sequence) mask is added to all scores as it is; a model with windows, or one that multiplies its mask,
    has to make its masks itself, from a (batch, sequence) one.
    """

    path: str
    interface: bool = True
    dropout: str | None = None
    takes_bias_mask: bool = True

    @property
    def quantizable(self) -> bool:
        """True where a quantizer reaches the probabilities."""
        return self.interface or self.dropout is not None


@dataclass(frozen=True)
class OnlyValue:
    """The one value that a key of ``config.json`` may have, and why: a number, or ``hidden`` or ``head`` for the size
    of the residual stream or of a head."""

    value: int | str
    reason: str


@dataclass(frozen=True)
class Family:
    """One Hugging Face ``model_type``.

    `base` is the encoder's attribute in a task model, `block` the module path of encoder block ``i`` inside it,
    `linears` the compressible linear layers of a block in the order in which they run, `words` the module path of the
    word-embedding table. The `*_key` fields name the sizes in ``config.json``.

    `ffn_norm` is the norm (inside a block) whose output the FFN reads. Where the residual stream itself is never
    normalised (pre-norm), `final_norm` is the norm behind the last block and `block_norm` the one in front of a block's
    attention; both are None where a block ends with its norm.

    With `shared_keys`, the names of how many groups of blocks there are and how many blocks are in a group, the layers
    of the model share those groups (ALBERT), and `block` has ``{group}`` and ``{i}``: a block then runs more than once
    (`runs`), and a matrix has one weight, one input scale and one output scale for all of its uses.
    """

    model_type: str
    base: str
    block: str
    linears: tuple[Linear, ...]
    inputs: tuple[str, ...]
    attention: Attention
    ffn_norm: str
    block_norm: str | None = None
    final_norm: str | None = None
    layers_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    intermediate_key: str = "intermediate_size"
    heads_key: str = "num_attention_heads"
    activation_key: str = "hidden_act"
    positions_after_padding: bool = False  # RoBERTa counts positions from pad_token_id + 1
    shared_keys: tuple[str, str] | None = None
    words: str = "embeddings.word_embeddings"
    embedding_key: str | None = None  # size of the table's rows, where the model has one that is not the hidden size
    fewest_types: int = 0  # kinds of tokens (type_vocab_size) from which on they are an input
    block_returns: int | None = None  # None: a block returns its output; else a tuple of this many, the output first
    position_readers: tuple[str, ...] = ()  # linear layers of a block that read embeddings of relative positions
    missing_heads: frozenset[str] = frozenset()  # tasks for which transformers has no head
    refused_keys: Mapping[str, str] = field(default_factory=dict)  # of config.json, with why a value there is refused
    only_values: Mapping[str, OnlyValue] = field(default_factory=dict)  # of keys of config.json

    def __post_init__(self) -> None:
        assert len({linear.role for linear in self.linears}) == len(self.linears)

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of a block's linear layers, in the order in which they run."""
        return tuple(linear.role for linear in self.linears)

    @property
    def pre_norm(self) -> bool:
        """True where the residual stream itself is never normalised."""
        return self.final_norm is not None

    @property
    def values(self) -> str:
        """The role of the linear layer that writes attention's values, in its last rows where the matrix is fused."""
        return next(linear.role for linear in self.linears if linear.role in ("value", "qkv"))

    @property
    def operands_are_outputs(self) -> bool:
        """True where attention multiplies what linear layers write, so that their output quantizers are its own."""
        return {operand for linear in self.linears for operand in linear.operands} == set(OPERANDS)

    def own_operands(self, plan: CompressionPlan, block: str) -> tuple[str, ...]:
        """The `OPERANDS` that the attention of a block quantizes itself where it is planned INT8: all but those that a
        linear layer with an output quantizer writes as they are."""
        written = [
            operand
            for linear in self.linears
            if plan.weights[self.weight(block, linear)].output_bits
            for operand in linear.operands
        ]
        return tuple(operand for operand in OPERANDS if operand not in written)

    def of_config(self, config: Mapping[str, object], source: str) -> Family:
        """This family as one model of it is: without the kinds of tokens where the model tells none apart. Raises
        `ArtifactError` for a variant that is refused."""
        for key, reason in self.refused_keys.items():
            if config.get(key):
                raise ArtifactError(f"{source}: {key} {config[key]!r} is not supported: {reason}")
        if self.positions_after_padding and config.get("pad_token_id") is None:
            raise ArtifactError(
                f"{source}: pad_token_id is missing, and {self.model_type} counts positions from it; set it to the "
                "tokenizer's padding id"
            )
        for key, only in self.only_values.items():
            if config.get(key) is not None and config[key] != (expected := self._expected(config, only)):
                raise ArtifactError(
                    f"{source}: {key} {config[key]!r} is not supported, only {expected} is: {only.reason}"
                )
        types = config.get("type_vocab_size")
        if self.fewest_types and (type(types) is not int or types < self.fewest_types):
            return replace(self, inputs=tuple(name for name in self.inputs if name != "token_type_ids"))
        return self

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

    def weight(self, block: str, linear: Linear) -> str:
        """Parameter name of one linear layer of a block."""
        return f"{block}.{linear.path}.weight"

    def readers(self, block: str, tensor: str) -> list[str]:
        """Parameter names of the linear layers of a block that read one of its tensors, such as `BLOCK`."""
        return [self.weight(block, linear) for linear in self.linears if linear.reads == tensor]

    def _expected(self, config: Mapping[str, object], only: OnlyValue) -> int:
        if isinstance(only.value, int):
            return only.value
        hidden = size_of(config, self.hidden_key)
        return hidden // self.heads(config) if only.value == "head" else hidden

    def require_own_positions(self, config: Mapping[str, object], source: str) -> None:
        """Raise `ArtifactError` where query and key matrices multiply the embeddings of positions, too: quantizers and
        masks are trained for what a block reads."""
        kinds = config.get("pos_att_type")
        if self.position_readers and config.get("share_att_key") and config.get("relative_attention") and kinds:
            raise ArtifactError(
                f"{source}: share_att_key true is not supported in a compressed checkpoint: its query and key matrices "
                "would multiply the embeddings of positions as well. Compress the dense model with `nxm compress`, "
                "which gives the positions matrices of their own"
            )

    def tensors(self) -> list[str]:
        """The tensors that a block's linear layers read, each once, in the order in which they are first read."""
        return list(dict.fromkeys(linear.reads for linear in self.linears))

    def sizes(self, config: Mapping[str, object]) -> dict[str, int]:
        """The sizes that linear layers have: of the residual stream, of all heads together, of the FFN, and of fused
        matrices."""
        hidden, wide = size_of(config, self.hidden_key), size_of(config, self.intermediate_key)
        across = hidden if config.get("head_dim") is None else self.heads(config) * size_of(config, "head_dim")
        return {"hidden": hidden, "heads": across, "3 heads": 3 * across, "wide": wide, "2 wide": 2 * wide}

    def weights(self, config: Mapping[str, object]) -> dict[str, tuple[int, int]]:
        """Every compressible parameter name with its shape (out, in), in the order in which the model runs them."""
        sizes = self.sizes(config)
        return {
            self.weight(block, linear): (sizes[linear.out], sizes[linear.in_])
            for block in self.blocks(config)
            for linear in self.linears
        }

    @property
    def word_embedding(self) -> str:
        """Parameter name of the word-embedding table, (tokens, features)."""
        return f"{self.base}.{self.words}.weight"

    def word_embedding_shape(self, config: Mapping[str, object]) -> tuple[int, int]:
        """(tokens, features) of the word-embedding table."""
        own = self.embedding_key if self.embedding_key in config else None
        return size_of(config, "vocab_size"), size_of(config, own or self.hidden_key)

    def linear(self, weight: str) -> Linear:
        """The linear layer of a weight of this family; `PlanError` for another parameter."""
        found = [linear for linear in self.linears if weight.endswith(f".{linear.path}.weight")]
        if not found:
            raise PlanError(f"{weight} is not a compressible weight of the {self.model_type} family")
        return max(found, key=lambda linear: len(linear.path))  # output.dense ends attention.output.dense, too

    def parts(self, weight: str) -> tuple[str, ...]:
        """The names of the parts of a weight, in the order of their rows; of one that is not fused, its own name."""
        parts = self.linear(weight).parts
        return tuple(part_name(weight, part.name) for part in parts) or (weight,)

    def role(self, weight: str) -> str:
        """The role of a weight of this family, such as ``ffn_up``."""
        return self.linear(weight).role

    def block_of(self, weight: str) -> str:
        """Module path of the block that a weight belongs to."""
        return weight.removesuffix(f".{self.linear(weight).path}.weight")

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
        linear = self.linear(weight)
        if placement == "ffn-only" and linear.reads in (BLOCK, CONTEXT):
            return WeightSpec(spec.pattern)
        behind = {"inputs": (), "products": (OPERAND,)}.get(placement, (OPERAND, RESIDUAL, ROTATED, GATED))
        outputs = spec.weight_bits and linear.writes in behind
        return replace(spec, output_bits=8 if outputs else None)

    def require_placement(self, plan: CompressionPlan) -> None:
        """Raise `PlanError` when a plan puts a quantizer where this family has no place for one, or leaves half of
        attention in float."""
        if plan.attention == "int8" and not self.attention.quantizable:
            raise PlanError(
                f"attention int8: transformers computes the attention of {self.model_type} inside its own module, "
                "where quantizers of the probabilities would not train; choose placement inputs or inputs-outputs"
            )
        for name, spec in plan.weights.items():
            writes = self.linear(name).writes
            if spec.output_bits and writes == INSIDE:
                raise PlanError(
                    f"{name}: no output quantizer belongs behind this layer: the activation comes next, and the "
                    "quantizer belongs behind that; drop its output_bits"
                )
            own = self.operands_are_outputs  # elsewhere attention has quantizers for what no layer quantizes
            if plan.attention == "int8" and own and writes == OPERAND and not spec.output_bits:
                raise PlanError(
                    f"{name}: attention int8 needs output_bits 8 on every query, key and value; this one has none. "
                    "Quantize it, or plan attention float"
                )
        if plan.residual == "int8" and self.pre_norm:
            raise PlanError(
                f"residual int8: the residual stream of {self.model_type} is never normalised, so no layer reads it as "
                "it is and there is no quantizer to share; plan residual float"
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
        """Longest sequence, in tokens, that the positions allow."""
        reserved = pad_id_of(config) + 1 if self.positions_after_padding else 0
        return size_of(config, "max_position_embeddings") - reserved


def part_name(weight: str, part: str) -> str:
    """The name in graphs and among scales of some rows of a fused weight: ``...attn.Wqkv.query.weight``."""
    return f"{weight.removesuffix('.weight')}.{part}.weight"
