"""Tokens are those of transformers, whatever ``tokenizer_config.json`` says, with ``tokenizer.json`` alone, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.models import load_tokenizer as load_for_training
from compressors.models import resolve
from nxm_export.data.examples import Examples, encode
from nxm_export.data.tokenization import copy_tokenizer, load_tokenizer, twin_of
from nxm_export.data.tokenizer_settings import read_tokenizer_settings
from nxm_export.errors import ArtifactError
from tests.support import tiny

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TEXT = st.lists(st.sampled_from(tiny.WORDS), min_size=1, max_size=12).map(" ".join)


def write(directory: Path, family: str, processor: Any = None, **settings_: Any) -> Path:
    """A model directory whose tokenizer has these settings, and another post-processor where one is given."""
    tiny.write_model(family, directory, head="classification")
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings_}))
    if processor is not None:
        tokenizer = json.loads((directory / "tokenizer.json").read_text())
        tokenizer["post_processor"] = processor
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


BERT = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
UNTYPED: dict[str, Any] = {"model_input_names": ["input_ids", "attention_mask"]}


@pytest.mark.parametrize(
    ("processor", "settings_"),
    [
        (None, {}),
        (None, {"truncation_side": "left"}),
        (None, UNTYPED),
        (BERT, UNTYPED),
        ({"type": "Sequence", "processors": [BERT]}, {**UNTYPED, "truncation_side": "left"}),
    ],
    ids=["plain", "left", "untyped", "untyped-bert", "both-sequence"],
)
def test_tokens_are_those_of_transformers(
    tmp_path_factory: pytest.TempPathFactory, processor: Any, settings_: dict[str, Any]
) -> None:
    import transformers

    model = write(tmp_path_factory.mktemp("model"), "bert", processor, **settings_)
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    alone = tmp_path_factory.mktemp("alone")
    copy_tokenizer(model, alone)
    saved = tmp_path_factory.mktemp("saved")
    trained = load_for_training(resolve(model))
    encode(trained.backend_tokenizer, Examples(["a film"], None, [0], "x"), 9, INPUTS)
    trained.save_pretrained(saved)
    (saved / "tokenizer_config.json").unlink()
    ours = [load_tokenizer(model), load_tokenizer(alone), load_tokenizer(saved), trained.backend_tokenizer]

    @settings(max_examples=25, deadline=None)
    @given(first=TEXT, second=st.none() | TEXT, length=st.integers(5, 16))
    def check(first: str, second: str | None, length: int) -> None:
        asked = {} if "model_input_names" in settings_ else {"return_token_type_ids": True}
        expected = theirs(first, second, truncation=True, max_length=length, **asked)
        types = expected.get("token_type_ids", [0] * len(expected["input_ids"]))
        examples = Examples([first], None if second is None else [second], [0], "x")
        for tokenizer in ours:
            (sample,) = encode(tokenizer, examples, length, INPUTS)
            assert (sample["input_ids"], sample["token_type_ids"]) == (expected["input_ids"], types)

    check()


def test_a_tokenizer_that_needs_nothing_is_copied_as_it_is(tmp_path: Path) -> None:
    model, out = write(tmp_path / "model", "bert"), tmp_path / "out"
    out.mkdir()
    copy_tokenizer(model, out)
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("settings_", "message"),
    [({"truncation_side": "middle"}, "is neither left nor right"), ({"model_input_names": 3}, "model_input_names")],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_tokenizer_settings(write(tmp_path, "bert", **settings_))


@pytest.mark.parametrize("kept", [set(), {"tokenizer_config.json"}])
def test_a_model_without_tokenizer_files_is_refused(tmp_path: Path, kept: set[str]) -> None:
    """transformers would make up a tokenizer that knows five special tokens."""
    tiny.write_model("bert", tmp_path, head="classification")
    for file in {"tokenizer.json", "tokenizer_config.json"} - kept:
        (tmp_path / file).unlink()
    with pytest.raises(ArtifactError, match=r"has no tokenizer \(tokenizer.json, vocab.txt"):
        load_for_training(resolve(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(ArtifactError, match=r"knows no token but special ones|cannot be loaded"):
        load_for_training(resolve(tmp_path))


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_twin_makes_the_same_tokens_and_has_settings_of_its_own(family: str, side: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "model", family, truncation_side=side))
    tokenizer.enable_truncation(9, direction=side)
    twin = twin_of(tokenizer)
    for texts in (("a good film , and a <mask> [MASK] plot",), ("good " * 20, "bad plot")):
        ours, its = tokenizer.encode(*texts), twin.encode(*texts)
        assert (its.ids, its.type_ids, its.attention_mask) == (ours.ids, ours.type_ids, ours.attention_mask)
    twin.no_truncation()
    assert tokenizer.truncation is not None
    assert len(tokenizer.encode("good " * 20).ids) == 9


def test_a_twin_that_would_be_another_tokenizer_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "model", "bert"))
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, "[UNK]"))
    monkeypatch.setattr("tokenizers.Tokenizer", lambda _: other)
    assert twin_of(tokenizer).encode("a good film").ids == tokenizer.encode("a good film").ids
