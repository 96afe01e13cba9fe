"""A config.json that says what nothing here honours is refused by its key, and whatever else it says is at most an
error of ours."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nxm_export.contract.checkpoint import has_head, read_config
from nxm_export.contract.families import FAMILIES, family_of
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import TASKS, labels_of, task_of
from nxm_export.errors import ArtifactError, NxmError

CONFIG = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 30,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "hidden_act": "gelu",
    "id2label": {"0": "no", "1": "yes"},
}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config: its weights are quantized.*'gptq'"),
        ({"quantization_config": "x"}, "quantization_config"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"hidden_act": "swish9"}, "hidden_act 'swish9' is no activation"),
        ({"hidden_act": {}}, "hidden_act must be a text, got {}"),
        ({"pad_token_id": 30}, "pad_token_id 30 is no row of the word-embedding table, which has 30"),
        ({"pad_token_id": -1}, "pad_token_id -1"),
        ({"pad_token_id": "0"}, "pad_token_id must be an integer, got '0'"),
        ({"pad_token_id": True}, "pad_token_id must be an integer, got True"),
        ({"id2label": ["no", "yes"]}, r"id2label must map 0, 1, 2, .* got \['no', 'yes'\]; write it as"),
        ({"id2label": {"0": "no", "2": "yes"}}, "id2label must map"),
        ({"id2label": {"0": {"name": "no"}, "1": "yes"}}, "id2label must map"),
        ({"chunk_size_feed_forward": 7}, "chunk_size_feed_forward 7"),
    ],
    ids=str,
)
def test_what_is_not_honoured_is_refused_by_its_key(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ArtifactError, match=f"^here: {complaint}"):
        family_of({**CONFIG, **change}, source="here")


@pytest.mark.parametrize(
    "change",
    [
        *({key: None} for key in ("pad_token_id", "id2label", "quantization_config")),
        {"position_embedding_type": "absolute"},
    ],
    ids=str,
)
def test_what_means_nothing_special_is_taken(change: dict[str, object]) -> None:
    assert family_of({**CONFIG, **change}) is FAMILIES["bert"]


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=4), st.just("gelu")
)
ODDITIES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.text(max_size=2), SCALARS, max_size=2))
KEYS = (
    *CONFIG,
    *("quantization_config", "position_embedding_type", "is_decoder", "problem_type", "chunk_size_feed_forward"),
    *("embedding_size", "num_hidden_groups", "inner_group_num", "n_layers", "dim", "activation"),
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(KEYS), ODDITIES, min_size=1, max_size=3), st.sampled_from(list(FAMILIES)))
def test_no_value_of_any_key_is_more_than_an_error_of_ours(change: dict[str, object], model_type: str) -> None:
    with TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / "model.safetensors").touch()
        text = json.dumps({**CONFIG, "model_type": model_type, **change})
        (directory / "config.json").write_text(text)
        for task in TASKS.values():
            with contextlib.suppress(NxmError):
                config = read_config(directory)
                family = family_of(config)
                layers = config.get("num_hidden_layers")
                if isinstance(layers, int) and layers < 99:
                    family.uniform_plan(config, WeightSpec.parse("2:4+W8"))
                has_head(directory, config, task)
                IOSpec.of(directory, config, family, task)
        for read in (task_of, labels_of):
            with contextlib.suppress(NxmError):
                read(json.loads(text))
