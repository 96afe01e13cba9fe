"""What a pass of an encoder computes, counted from ``config.json``: products with weights, and what is around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nxm_export.contract.config_values import size_of
from nxm_export.contract.encoder_family import FFN, WIDE, Family
from nxm_export.errors import ArtifactError, EngineError

_LARGEST = 2**24  # of a model's sizes: beyond, its config.json is damaged
_NORM_BYTES = 6  # an element: FP16 residual read and written, and 2 bytes: FP16 product read, or INT8 read and written


@dataclass(frozen=True)
class WeightProduct:
    """A product of (tokens, K) by a weight (K, N): `runs` of them in a pass, with `matrices` different weights."""

    name: str
    k: int
    n: int
    runs: int
    matrices: int

    @property
    def can_be_sparse(self) -> bool:
        """True where groups of four divide K."""
        return self.k % 4 == 0


@dataclass(frozen=True)
class Step:
    """What has no weights, a run: operations in FP16, and bytes read and written where the products around it are FP16
    or INT8."""

    name: str
    runs: int
    operations: int
    fp16_bytes: int
    int8_bytes: int


@dataclass(frozen=True)
class Workload:
    """One pass over `batch` x `sequence` tokens. `steps` is None where it is not known what is around the products;
    `notes` say what was not counted."""

    batch: int
    sequence: int
    products: tuple[WeightProduct, ...]
    steps: tuple[Step, ...] | None
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Rows of every product with a weight."""
        return self.batch * self.sequence

    @property
    def weights(self) -> int:
        """Elements of all weights, each once."""
        return sum(product.k * product.n * product.matrices for product in self.products)


def encoder_workload(family: Family, config: Mapping[str, object], batch: int, sequence: int) -> Workload:
    """The pass of an encoder over (batch, sequence) tokens, none of them padding.

    Steps are counted as if fused as far as can be: attention reads query, key and value and writes its result, scores
    never reach the memory; biases, activations and quantizers cost nothing behind a product. `EngineError` for a
    sequence that the model does not take, `ArtifactError` for sizes that no model has.
    """
    longest = family.max_positions(config)
    if sequence > longest:
        raise EngineError(f"the model takes at most {longest} tokens, {sequence} were asked; give a shorter sequence")
    sizes, layers = family.sizes(config), size_of(config, family.layers_key)
    if max(layers * 1000, *sizes.values()) > _LARGEST:
        raise ArtifactError(
            f"config.json: no model has {layers} layers of these sizes ({sizes}); is the file complete?"
        )
    windows = bool(config.get("local_attention"))
    return _workload(family, sizes, family.runs(config), batch, sequence, _notes(family, windows=windows))


def planned_workload(
    family: Family, shapes: Mapping[str, tuple[int, int]], uses: Mapping[str, int], batch: int, sequence: int
) -> Workload | None:
    """`encoder_workload` of a graph: by the (out, in) `shapes` of its plan, and how many products read each weight.

    None where a weight of the plan is read by none, and where the shapes are not those of one kind of block. The
    longest sequence is not known.
    """
    sizes: dict[str, int] = {}
    blocks: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        linear = family.linear(name)
        for size, value in zip((linear.out, linear.in_), shape, strict=True):
            if sizes.setdefault(size, value) != value:
                return None
        blocks.setdefault(family.block_of(name), {})[linear.role] = uses.get(name, 0)
    if not blocks or any(set(found) != set(family.roles) or not all(found.values()) for found in blocks.values()):
        return None
    # A fused matrix may be read by a product for each of its parts.
    runs = [block for block, found in blocks.items() for _ in range(min(found.values()))]
    windows = not family.attention.takes_bias_mask and not family.position_readers
    notes = _notes(family, windows=windows)
    return _workload(family, {"heads": sizes["hidden"], **sizes}, runs, batch, sequence, notes)


def _workload(
    family: Family, sizes: Mapping[str, int], runs: Sequence[str], batch: int, sequence: int, notes: tuple[str, ...]
) -> Workload:
    """The pass, from the sizes that linear layers have (see `Family.sizes`), and from the block of every run."""
    products = tuple(
        WeightProduct(linear.role, sizes[linear.in_], sizes[linear.out], len(runs), len(set(runs)))
        for linear in family.linears
    )
    tokens, across, blocks = batch * sequence, sizes["heads"], len(runs)
    moved = 4 * tokens * across  # query, key, value and the result
    norm = _NORM_BYTES * tokens * sizes["hidden"]
    steps = [
        Step("attention", blocks, 4 * tokens * sequence * across, 2 * moved, moved),
        Step("norm", 2 * blocks + 1, 0, norm, norm),  # one behind the embeddings
    ]
    written = sum(sizes[linear.out] for linear in family.linears if linear.reads == FFN)
    wide = next(sizes[linear.in_] for linear in family.linears if linear.reads == WIDE)
    if written > wide:
        steps.append(Step("gate", blocks, 0, 2 * tokens * (written + wide), tokens * (written + wide)))
    return Workload(batch, sequence, products, tuple(steps), notes)


def _notes(family: Family, *, windows: bool) -> tuple[str, ...]:
    notes = ["the head, and what projects embeddings to the hidden size, are not counted"]
    if family.position_readers:
        notes.append("products with relative positions are not counted")
    if windows:
        notes.append("attention is counted over the whole sequence in every layer, though some look at a window")
    return tuple(notes)
