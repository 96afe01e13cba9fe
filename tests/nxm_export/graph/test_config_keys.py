"""Every key of a family's config.json is honoured, or refused by its name: the module that is traced computes what
transformers computes from the same file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.reference import pytorch
from nxm_export.contract.checkpoint import open_checkpoint, read_config
from nxm_export.contract.families import family_of
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import ArtifactError, ExportError
from nxm_export.graph.exporter import export
from nxm_export.graph.tracing import traced_module
from nxm_export.hf.protocols import AutoClass
from tests.support import baked, onnx_text, tiny

ROTARY = ("modernbert", "nomic_bert", "gte", "jina_embeddings_v3")
THETA: dict[str, Any] = {"rope_theta": 100.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 24, **THETA}
LLAMA = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
LINEAR = {"rope_type": "linear", "factor": 2.0, **THETA}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 20}
HALF: dict[str, Any] = {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}
# Of keys that transformers' classes declare: other values than the tiny models have. Those of dropout, of training and
# of other tasks' heads must change nothing, which is tried as well.
VALUES: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation"), ("relu", "gelu_new", "silu", "quick_gelu")),
    **dict.fromkeys(("layer_norm_eps", "norm_eps"), (0.1,)),
    **dict.fromkeys(("hidden_size", "dim"), (64,)),
    **dict.fromkeys(("intermediate_size", "hidden_dim"), (48,)),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), (1, 3)),
    **dict.fromkeys(("num_attention_heads", "n_heads"), (2, 8)),
    **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), (True,)),
    **dict.fromkeys(("decoder_bias", "tie_word_embeddings", "return_dict", "legacy", "summary_use_proj"), (False,)),
    **dict.fromkeys(("sparse_prediction", "deterministic_flash_attn", "sinusoidal_pos_embds", "use_cache"), (True,)),
    **dict.fromkeys(("is_encoder_decoder", "output_hidden_states"), (True,)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), (5, None)),
    **dict.fromkeys(("initializer_range", "initializer_cutoff_factor"), (0.5,)),
    **dict.fromkeys(("classifier_activation", "pooler_hidden_act", "summary_activation"), ("relu", "tanh")),
    "vocab_size": (40,),
    "max_position_embeddings": (20,),
    "type_vocab_size": (1, 3),
    "pad_token_id": (4,),
    "embedding_size": (8, 32),
    "num_hidden_groups": (2,),
    "inner_group_num": (2,),
    "problem_type": ("single_label_classification",),
    "dtype": ("float16", "bfloat16"),
    "summary_type": ("last",),
    "sparse_pred_ignore_index": (0,),
    "classifier_pooling": ("mean",),
    "layer_types": (["sliding_attention"] * 2, ["full_attention"] * 2),
    "local_attention": (2, 7, 16),
    "head_dim": (4, 16),
    "relative_attention": (False,),
    "max_relative_positions": (20, -1),
    "position_biased_input": (True,),
    "pos_att_type": ([], None, "c2p", "p2c|c2p", ["p2c"]),
    "rope_parameters": (
        {"rope_type": "default", **THETA},
        LINEAR,
        YARN,
        {"rope_type": "llama3", "factor": 2.0, **LLAMA, **THETA},
    ),
}
# Of keys that only their code reads, or that former configurations have.
MORE: dict[str, dict[str, tuple[object, ...]]] = {
    "deberta-v2": {
        "position_buckets": (-1, 4),
        "norm_rel_ebd": ("none", "layer_norm|other"),
        "share_att_key": (False, True),
        "embedding_size": (16,),
        "pooler_hidden_size": (32,),
        "attention_head_size": (8,),
        "conv_kernel_size": (0,),
        "conv_act": ("relu",),
        "cls_dropout": (0.5,),
        "type_vocab_size": (0, 1, 3),
    },
    "modernbert": {
        "global_attn_every_n_layers": (1, 2),
        "local_rope_theta": (50.0,),
        "global_rope_theta": (50.0,),
        "head_dim": (8,),
        "rope_parameters": ({"full_attention": {**YARN}, "sliding_attention": {**LINEAR}},),
    },
    **{family: {"rope_theta": (50.0,)} for family in ROTARY[1:]},
}
DECODERS: dict[str, tuple[object, ...]] = {"is_decoder": (True,), "add_cross_attention": (True,)}
BEHIND_PADDING: dict[str, tuple[object, ...]] = {**DECODERS, "pad_token_id": (None,)}
OTHER_ROTATIONS: dict[str, tuple[object, ...]] = {
    "rope_parameters": (
        {"rope_type": "dynamic", "factor": 2.0, **THETA},
        {"rope_type": "longrope", "factor": 2.0, **LONG, **THETA},
        HALF,
    ),
    "rope_scaling": ({"type": "dynamic", "factor": 2.0},),
    "partial_rotary_factor": (0.5,),
}
REFUSED: dict[str, dict[str, tuple[object, ...]]] = {
    "deberta-v2": {
        "conv_kernel_size": (3,),
        "attention_head_size": (4,),
        "pooler_hidden_size": (16,),
        "pos_att_type": (["c2p", "p2p"], "p2p", 3, [["c2p"]]),
    },
    "mpnet": {"relative_attention_num_buckets": (16, 64), "pad_token_id": (0, 4, None)},
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), BEHIND_PADDING),
    "modernbert": {
        "head_dim": (4,),
        "rope_parameters": ({"full_attention": {"rope_type": "dynamic", "factor": 2.0, **THETA}},),
    },
    **dict.fromkeys(ROTARY[1:], OTHER_ROTATIONS),
    **dict.fromkeys(("bert", "electra"), DECODERS),
    "albert": {"pad_token_id": ("0",), "position_embedding_type": ("relative_key",)},
    "distilbert": {"chunk_size_feed_forward": (7,)},
}
# What another test is about, or what says nothing of what is computed.
ELSEWHERE = {
    *("transformers_version", "architectures", "id2label", "label2id"),
    *("is_decoder", "add_cross_attention", "chunk_size_feed_forward", "relative_attention_num_buckets"),
}


def declared(family: str) -> list[str]:
    config = tiny._config(family, tiny.HIDDEN, tiny.INTERMEDIATE, tiny.LAYERS)
    return [entry.name for entry in dataclasses.fields(type(config))]


def is_dropout(key: str) -> bool:
    return "dropout" in key


def flips(family: str) -> Iterator[tuple[str, str, object]]:
    values = {key: VALUES.get(key, (0.5,)) for key in declared(family) if key in VALUES or is_dropout(key)}
    values |= MORE.get(family, {})
    refused = REFUSED.get(family, {})
    for key, several in values.items():
        yield from ((family, key, value) for value in several if value not in refused.get(key, ()))


ALL = [flip for family in tiny.FAMILIES for flip in flips(family)]


def changed(family: str, key: str, value: object) -> dict[str, Any]:
    """The fields of a family's tiny configuration with one of them changed, and what must go with it."""
    config = tiny._config(family, tiny.HIDDEN, tiny.INTERMEDIATE, tiny.LAYERS).to_dict()
    for name in ("model_type", "transformers_version", "architectures", "id2label", "label2id"):
        config.pop(name, None)
    if key == "hidden_size" and "pooler_hidden_size" in config:
        config["pooler_hidden_size"] = value
    if "head_dim" in config and key in ("hidden_size", "num_attention_heads"):
        config.pop("head_dim")
    if key.endswith("rope_theta"):
        config.pop("rope_parameters")
    if key in ("global_attn_every_n_layers", "num_hidden_layers"):
        config.pop("layer_types", None)
    if key == "classifier_pooling":
        config["classifier_bias"] = True
    return {**config, key: value}


def write(family: str, key: str, value: object, out: Path) -> Path:
    """A model of that configuration with random weights that all matter."""
    kind = type(tiny._config(family, tiny.HIDDEN, tiny.INTERMEDIATE, tiny.LAYERS))
    torch.manual_seed(0)
    auto = cast("AutoClass", transformers.AutoModelForSequenceClassification)
    model: Any = auto.from_config(kind(**changed(family, key, value)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out, save_original_format=False)
    tiny.write_tokenizer(family, out)
    file = out / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if key in ("return_dict", "output_hidden_states", "dtype") or key not in config:
        file.write_text(json.dumps({**config, key: value}), encoding="utf-8")
    return out


def loaded(path: Path) -> Any:
    """The model as transformers loads it."""
    auto: Any = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", return_dict=True).train(False)


def outputs(model: Any, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**feeds, return_dict=True)
    return cast("torch.Tensor", found["logits"])


def require_honoured(family: str, key: str, value: object) -> None:
    task = TASKS["classification"]
    with TemporaryDirectory() as scratch:
        path = write(family, key, value, Path(scratch) / "model")
        config = read_config(path)
        kind = family_of(config)
        longest = IOSpec.of(path, config, kind, task).max_length
        theirs = loaded(path)
        ours = traced_module(path, task, kind, "float32")
        for sequence in (5, min(41, longest)):
            arrays = baked.feeds(family, 3, sequence, padding=2)
            if "token_type_ids" in kind.inputs:
                arrays["token_type_ids"] = arrays["input_ids"] % (2 if config.get("type_vocab_size") != 1 else 1)
            feeds = {name: torch.from_numpy(arrays[name]) for name in kind.inputs}
            with torch.no_grad():
                actual = ours(*feeds.values())[0]
            expected = outputs(theirs, feeds)
            assert bool(expected.isfinite().all())
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_key_that_transformers_declares_is_tried(family: str) -> None:
    untried = {key for key in declared(family) if not is_dropout(key)} - VALUES.keys() - ELSEWHERE
    assert not untried, f"give these keys of {family} other values in VALUES, or say where they are tested"


@settings(deadline=None, max_examples=8)
@given(st.sampled_from(ALL))
def test_a_key_is_honoured(flip: tuple[str, str, object]) -> None:
    require_honoured(*flip)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "key", "value"), flips("deberta-v2"), ids=str)
def test_every_key_of_deberta_is_honoured(family: str, key: str, value: object) -> None:
    require_honoured(family, key, value)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "key", "value"), [flip for flip in ALL if flip[0] != "deberta-v2"], ids=str)
def test_every_key_of_every_family_is_honoured(family: str, key: str, value: object) -> None:
    require_honoured(family, key, value)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [(family, key, value) for family, keys in REFUSED.items() for key, values in keys.items() for value in values],
    ids=str,
)
def test_what_no_graph_honours_is_refused_by_its_key(family: str, key: str, value: object) -> None:
    config = tiny._config(family, tiny.HIDDEN, tiny.INTERMEDIATE, tiny.LAYERS).to_dict()
    family_of(config)
    named = "decoders are not supported" if key in ("is_decoder", "add_cross_attention") else key
    with pytest.raises(ArtifactError, match=rf"config\.json: {named}"):
        family_of({**config, key: value})


def test_a_compressed_checkpoint_that_shares_its_matrices_with_positions_is_refused(tmp_path: Path) -> None:
    """Its query matrix is sparse and has a quantizer in front of it, both made for what a block reads."""
    path = baked.write_checkpoint("deberta-v2", tmp_path / "c", options={"share_att_key": True})
    with pytest.raises(ArtifactError, match=r"config\.json: share_att_key true is not supported in a compressed"):
        open_checkpoint(path)
    changes: tuple[dict[str, object], ...] = ({"relative_attention": False}, {"pos_att_type": []})
    for change in changes:  # there is nothing to share it with
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        (tmp_path / "other").mkdir(exist_ok=True)
        for file in path.iterdir():
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
        open_checkpoint(tmp_path / "other")


def test_a_model_that_does_not_run_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a configuration says that breaks transformers' own code, and that is not known here."""
    path = tiny.write_model("bert", tmp_path / "m", head="classification")

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(transformers.BertModel, "forward", fails)
    with pytest.raises(ExportError, match=r"config\.json describes does not run \(mat1 and mat2 shapes"):
        export(path, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


@pytest.mark.slow
def test_a_graph_rotates_as_its_configuration_says(tmp_path: Path) -> None:
    """The angles are computed in the graph, from what the configuration says for each kind of layer."""
    value = {"full_attention": {**YARN}, "sliding_attention": {**LINEAR}}
    path = write("modernbert", "rope_parameters", value, tmp_path / "m")
    export(path, tmp_path / "graph")
    feeds = baked.feeds("modernbert", 3, 41, padding=7)
    expected = outputs(loaded(path), {name: torch.from_numpy(array) for name, array in feeds.items()})
    actual = onnx_text.run(tmp_path / "graph" / "model.onnx", feeds)["logits"]
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-4)


def test_a_row_of_padding_has_a_number_where_the_head_takes_the_mean(tmp_path: Path) -> None:
    """ModernBERT's head divides by the number of tokens; batches are filled up with rows that have none."""
    path = write("modernbert", "classifier_pooling", "mean", tmp_path / "m")
    task, family = TASKS["classification"], family_of(read_config(path))
    feeds = {name: torch.from_numpy(array) for name, array in baked.feeds("modernbert", 4, 11, padding=3).items()}
    feeds["attention_mask"][2] = 0
    expected = outputs(loaded(path), feeds)
    assert not bool(expected[2].isfinite().any())
    with torch.no_grad():
        actual = traced_module(path, task, family, "float32")(*feeds.values())[0]
    assert bool(actual.isfinite().all())
    torch.testing.assert_close(actual[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-4, atol=1e-4)
    with pytorch.load(path, task=task.name, exact=True) as reference:
        logits = reference.run({name: value.numpy() for name, value in feeds.items()})["logits"]
    assert bool(torch.from_numpy(logits).isfinite().all())
    torch.testing.assert_close(torch.from_numpy(logits).float(), actual, rtol=1e-3, atol=1e-3)
