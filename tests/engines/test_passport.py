"""The passport of an engine directory, on every backend that can build here: what is not as it was built is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.base import (
    backend,
)
from engines.passport import load_passport
from nxm_export.data.tokenization import load_tokenizer
from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable
from nxm_export.storage.json_files import as_object
from tests.support.records import PASSPORT

BAD_PROFILE = {"minimum": [1, 1], "optimum": [1, 8], "maximum": [1]}


FALLING_PROFILE = {"minimum": [4, 4], "optimum": [2, 2], "maximum": [8, 8]}


BAD_BINDING = {"name": "x", "dtype": "int64", "shape": "all"}


def nested(depth: int) -> Any:
    return {"deeper": nested(depth - 1)} if depth else {}


class TestTampering:
    def load(self, path: Path) -> None:
        backend(load_passport(path).backend).load(path)

    @pytest.mark.parametrize("at", [0, 0.5, 1])
    def test_one_flipped_byte_is_found(self, copy: Path, at: float) -> None:
        file = copy / load_passport(copy).engine
        data = bytearray(file.read_bytes())
        data[min(int(at * len(data)), len(data) - 1)] ^= 1
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"is not the engine of its passport .* build it again"):
            self.load(copy)

    def test_another_models_engine_is_found(self, copy: Path, tiny_engine: Callable[..., Path]) -> None:
        passport = load_passport(copy)
        other = tiny_engine(passport.backend, "bert", "inputs")
        shutil.copy(other / passport.engine, copy / passport.engine)
        with pytest.raises(ArtifactError, match="is not the engine of its passport"):
            self.load(copy)

    def test_a_missing_engine_is_named(self, copy: Path) -> None:
        (copy / load_passport(copy).engine).unlink()
        with pytest.raises(ArtifactError, match="is missing"):
            self.load(copy)

    def test_a_missing_tokenizer_is_named_where_it_is_needed(self, copy: Path) -> None:
        (copy / "tokenizer.json").unlink()
        with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing; copy it from the model"):
            load_tokenizer(copy)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "has no passport.json: it is not an engine directory; make one with `nxm build`"),
            ("{", "passport.json: not valid JSON"),
            ("[]", "not a nxm-passport/2 file"),
            (
                '{"schema": "nxm-passport/2"}',
                "passport.json: Object missing required field `backend`; build the engine again",
            ),
            ('{"schema": "nxm-passport/1"}', "passport.json: malformed nxm-passport/1 file"),
            (
                lambda data: {**data, "schema": "nxm-passport/9"},
                "schema nxm-passport/9 is not the nxm-passport/2 that this version reads",
            ),
            (lambda data: {**data, "colour": "red"}, "passport.json: unknown field colour"),
            (
                lambda data: {**data, "plan": {**data["plan"], "colour": "red"}},
                "passport.json: unknown field plan.colour",
            ),
            (lambda data: {**data, "engine": 5}, "passport.json: engine: Expected `str`, got `int`"),
            (lambda data: {**data, "requires": []}, "passport.json: requires: Expected `object`, got `array`"),
            (
                lambda data: {**data, "plan": {**data["plan"], "compression": {"hw": float("nan")}}},
                "passport.json: not valid JSON (NaN is not a JSON number)",
            ),
            (
                lambda data: {**data, "options": {"auto": nested(100)}},
                "passport.json: not valid JSON (nested more than 64 deep)",
            ),
            (
                lambda data: {**data, "profiles": [BAD_PROFILE]},
                "passport.json: profiles[0].maximum: Expected `array` of length 2, got 1",
            ),
            (lambda data: {**data, "profiles": [FALLING_PROFILE]}, "passport.json: profile sizes must rise from 1"),
            (
                lambda data: {**data, "bindings": {"inputs": [BAD_BINDING]}},
                "passport.json: bindings.inputs[0].shape: Expected `array`, got `str`",
            ),
            (lambda data: {**data, "engine": "../model.onnx"}, "names an engine outside its directory"),
            (lambda data: {**data, "backend": "tflite"}, "unknown backend 'tflite'; choose one of ort"),
            (
                lambda data: {**data, "requires": {"moon": "full"}},
                "was built for moon full, and this machine has moon none; rebuild it here: nxm build",
            ),
        ],
    )
    def test_a_passport_that_is_not_right_is_refused(self, copy: Path, text: Any, message: str) -> None:
        file = copy / "passport.json"
        if text is None:
            file.unlink()
        else:
            file.write_text(text if isinstance(text, str) else json.dumps(text(json.loads(file.read_text()))))
        with pytest.raises((ArtifactError, EngineError), match=re.escape(message)):
            self.load(copy)

    def test_a_passport_of_the_first_schema_is_read(self, copy: Path) -> None:
        """It had an empty plan for none, named the embedding only where it was INT8, and called precision overrides
        islands."""
        passport = load_passport(copy)
        former = {"schema": "nxm-passport/1", **passport.to_dict()}
        graph = as_object(former["graph"])
        del as_object(former["plan"])["embedding"]
        graph["islands"] = graph.pop("precision_overrides")
        (copy / "passport.json").write_text(json.dumps(former))
        assert load_passport(copy) == passport
        graph["table"] = "00"
        (copy / "passport.json").write_text(json.dumps(former))
        assert load_passport(copy).graph["embedding_sha256"] == "00"
        (copy / "passport.json").write_text(json.dumps({**former, "plan": {}}))
        assert load_passport(copy).plan is None

    def test_a_link_out_of_the_directory_is_refused(self, copy: Path, directory: Path) -> None:
        file = copy / load_passport(copy).engine
        file.unlink()
        file.symlink_to(directory / file.name)
        with pytest.raises((ArtifactError, EngineUnavailable)):
            self.load(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": "two"}, "passport.json: options.threads must be a whole number, got 'two'; build"),
        ({"workspace_bytes": True}, "passport.json: options.workspace_bytes must be a whole number, got True"),
        ({"level": 5, "build_route": ["a"]}, "passport.json: options.build_route must be a text, got ['a']"),
    ],
    ids=str,
)
def test_a_recorded_option_of_another_type_is_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(message)):
        replace(PASSPORT, options=options).rebuild_command()


def test_the_command_that_rebuilds_has_the_recorded_options() -> None:
    options = {"sparse": "never", "level": 5, "workspace_bytes": 1 << 30, "threads": 2, "build_route": "a=b"}
    command = replace(PASSPORT, options=options).rebuild_command()
    assert command.endswith(
        "--sparse never --level 5 --workspace 1024 --threads 2 --build-route 'a=b' --out ENGINE_DIR"
    )
