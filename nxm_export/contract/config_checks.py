"""What a ``config.json`` of others may say that this project cannot honour: refused by its key, before anything is
loaded.

transformers ignores some of these keys without a word, and then computes another model than the one that was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nxm_export.errors import ArtifactError

# Activations of transformers that a graph and the reference compute; the GELUs of `families` and those beside them.
ACTIVATIONS = (
    *("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("relu", "relu6", "silu", "swish", "mish", "tanh", "sigmoid", "leaky_relu", "quick_gelu", "relu2"),
)
POSITION_KINDS = ("c2p", "p2c", "none", "")
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def require_honoured(config: Mapping[str, object], activation_key: str, source: str) -> None:
    """Raise `ArtifactError` for quantized weights, relative positions and rotations that no graph here has, an unknown
    activation, a padding id outside of the vocabulary, an ``id2label`` that names no classes, and an FFN in chunks."""
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ArtifactError(
            f"{source}: quantization_config: its weights are quantized already ({method!r}), and this project "
            "compresses float weights; give the model that it was made from"
        )
    positions = config.get("position_embedding_type")
    if positions not in (None, "absolute"):
        raise ArtifactError(
            f"{source}: position_embedding_type {positions!r} is not supported, and transformers would ignore it; only "
            "absolute positions are"
        )
    activation = config.get(activation_key)
    if activation is not None and not isinstance(activation, str):
        raise ArtifactError(f"{source}: {activation_key} must be a text, got {activation!r}; is the file complete?")
    if activation is not None and activation not in ACTIVATIONS:
        raise ArtifactError(
            f"{source}: {activation_key} {activation!r} is no activation that is known here; it is one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    if config.get("chunk_size_feed_forward") not in (None, 0):
        raise ArtifactError(
            f"{source}: chunk_size_feed_forward {config['chunk_size_feed_forward']!r} allows some lengths alone; set "
            "it to 0, which changes no result"
        )
    _require_rotation(config, source)
    _require_kinds(config, source)
    _require_padding(config, source)
    _require_names(config, source)


def _require_rotation(config: Mapping[str, object], source: str) -> None:
    """Rotary positions of one kind for all lengths, over whole heads."""
    for key in ("rope_parameters", "rope_scaling"):
        for where, rotation in _mappings(key, config.get(key)):
            kind = rotation.get("rope_type", rotation.get("type"))
            if kind in _LENGTH_DEPENDENT:
                raise ArtifactError(
                    f"{source}: {where}: rope_type {kind!r} is not supported: its angles depend on how long the "
                    "longest text of a batch is, and a graph has one set of them"
                )
            _require_whole_heads(rotation, where, source)
    _require_whole_heads(config, "", source)


def _mappings(where: str, value: object) -> Iterator[tuple[str, Mapping[str, object]]]:
    """A mapping and those inside it, with where they stand: some families have one for each kind of layer."""
    if isinstance(value, Mapping):
        yield where, value
        for key, inner in value.items():
            yield from _mappings(f"{where}.{key}", inner)


def _require_whole_heads(values: Mapping[str, object], where: str, source: str) -> None:
    share = values.get("partial_rotary_factor")
    if share not in (None, 1):
        name = f"{where}.partial_rotary_factor" if where else "partial_rotary_factor"
        raise ArtifactError(
            f"{source}: {name} {share!r} is not supported, and transformers would ignore it where the rotation is of "
            "the default type; only whole heads are rotated"
        )


def _require_kinds(config: Mapping[str, object], source: str) -> None:
    """Of DeBERTa's products with relative positions those that transformers computes."""
    value = config.get("pos_att_type")
    kinds = [kind.strip() for kind in value.lower().split("|")] if isinstance(value, str) else value
    if kinds is None or (isinstance(kinds, list) and all(kind in POSITION_KINDS for kind in kinds)):
        return
    raise ArtifactError(
        f"{source}: pos_att_type {value!r} is not supported, and transformers would ignore what it does not know of "
        "it; only c2p and p2c are"
    )


def _require_padding(config: Mapping[str, object], source: str) -> None:
    padding, tokens = config.get("pad_token_id"), config.get("vocab_size")
    if padding is None:
        return
    if type(padding) is not int:
        raise ArtifactError(f"{source}: pad_token_id must be an integer, got {padding!r}; is the file complete?")
    if not 0 <= padding < (tokens if type(tokens) is int else 2**31):
        raise ArtifactError(
            f"{source}: pad_token_id {padding!r} is no row of the word-embedding table, which has {tokens!r}; set it "
            "to the tokenizer's padding id"
        )


def _require_names(config: Mapping[str, object], source: str) -> None:
    names = config.get("id2label")
    if names is None:
        return
    if isinstance(names, Mapping):
        by_index = {str(key): name for key, name in names.items()}
        known = set(by_index) == {str(i) for i in range(len(by_index))} and bool(by_index)
        if known and all(isinstance(name, (str, int, float)) for name in by_index.values()):
            return
    raise ArtifactError(
        f"{source}: id2label must map 0, 1, 2, ... to class names, got {_short(names)}; write it as "
        '{"0": "first name", "1": "second name"}'
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
