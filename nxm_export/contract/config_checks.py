"""What a ``config.json`` of others may say that this project cannot honour: refused by its key, before anything is
loaded.

transformers ignores some of these keys without a word, and then computes another model than the one that was trained.
"""

from __future__ import annotations

from collections.abc import Mapping

from nxm_export.errors import ArtifactError

# Activations of transformers that a graph and the reference compute; the GELUs of `families` and those beside them.
ACTIVATIONS = (
    *("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("relu", "relu6", "silu", "swish", "mish", "tanh", "sigmoid", "leaky_relu", "quick_gelu", "relu2"),
)


def require_honoured(config: Mapping[str, object], activation_key: str, source: str) -> None:
    """Raise `ArtifactError` for quantized weights, relative positions, an unknown activation, a padding id outside of
    the vocabulary, an ``id2label`` that names no classes, and an FFN in chunks."""
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
    _require_padding(config, source)
    _require_names(config, source)


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
