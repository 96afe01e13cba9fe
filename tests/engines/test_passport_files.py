"""What a passport vouches for, on a directory of made-up files: each is as it was built, or is refused by name."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engines.base import MOST_SHAPES, MOST_THREADS, Binding, Profile
from engines.passport import Bindings, BuildFacts, EnginePassport, covered_spec, covered_tokenizer, load_passport
from engines.serving.repository import signature
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import COUNTINGS, WeightSpec
from nxm_export.errors import ArtifactError, Notice
from nxm_export.storage.hashing import HashedFiles
from tests.support import exact_engine
from tests.support.records import PASSPORT

ENGINE, LOG = b"an engine", b"its kernels \xff"
CONFIG = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def facts_of(file: Path, **changed: object) -> BuildFacts:
    facts = BuildFacts(
        device={"kind": "gpu"},
        requires={"gpu": "L4", "cuda": "12"},
        options={"threads": 2},
        graph={"nxm.dtype": "float16", "nxm.islands": "x", "producer": "pytorch"},
        source=HashedFiles.of(file.parent, [file.name]),
        bindings=Bindings((Binding("input_ids", "int64", (-1, -1)),), (Binding("logits", "float32", (-1, 2)),)),
        profiles=(Profile((1, 1), (8, 16), (16, 24)),),
        evidence=("log",),
    )
    return replace(facts, **changed)  # type: ignore[arg-type]  # fields of a test's own choice


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return exact_engine.write_graph(tmp_path / "graph")


@pytest.fixture
def directory(graph: Path, tmp_path: Path) -> Path:
    """An engine directory as a build leaves it."""
    made = tmp_path / "engine"
    made.mkdir()
    (made / "engine.bin").write_bytes(ENGINE)
    (made / "log").write_bytes(LOG)
    for name in ("spec.json", "tokenizer.json"):
        (made / name).write_bytes((graph.parent / name).read_bytes())
    EnginePassport.issue("trt", made / "engine.bin", graph, facts_of(graph))
    return made


HERE = {"gpu": "L4", "cuda": "12", "driver": "550"}


def test_a_passport_has_what_the_build_said_and_the_hashes_of_what_it_wrote(directory: Path, graph: Path) -> None:
    passport = load_passport(directory)
    assert (passport.backend, passport.engine) == ("trt", "engine.bin")
    assert passport.graph == {"dtype": "float16", "precision_overrides": "x"}
    assert passport.plan is None
    assert passport.onnx_sha256 == sha256(graph.read_bytes())
    assert passport.evidence == {"log": sha256(LOG)}
    companions = {name: sha256((directory / name).read_bytes()) for name in ("spec.json", "tokenizer.json")}
    assert passport.companions == companions
    lines = [f"{sha256(ENGINE)}  engine.bin\n", *(f"{digest}  {name}\n" for name, digest in companions.items())]
    assert passport.contents_sha256 == sha256("".join(lines).encode()), "as sha256sum prints it"
    assert passport.read_engine(directory, HERE) == ENGINE
    passport.require_whole(directory)
    assert covered_spec(directory, passport).task == "classification"
    assert covered_tokenizer(directory, passport).encode("good film").ids[0] == 2
    assert [binding.name for binding in (*passport.tensors("inputs"), *passport.tensors("outputs"))] == [
        "input_ids",
        "logits",
    ]


def test_a_graph_that_changed_while_it_was_built_gets_no_passport(directory: Path, graph: Path) -> None:
    facts = facts_of(graph)
    graph.write_bytes(graph.read_bytes() + b"\0")
    (directory / "passport.json").unlink()
    with pytest.raises(ArtifactError, match="changed while it was read"):
        EnginePassport.issue("trt", directory / "engine.bin", graph, facts)
    assert not (directory / "passport.json").exists()


def test_the_plan_of_a_graph_is_summed_up(directory: Path, graph: Path) -> None:
    plan = FAMILIES["bert"].uniform_plan(CONFIG, WeightSpec.parse("2:4+W8"))
    facts = facts_of(graph, graph={"nxm.plan": plan.to_json()})
    summary = EnginePassport.issue("trt", directory / "engine.bin", graph, facts).plan
    assert summary is not None
    assert summary.options == plan.pattern_counts
    assert summary.compression == {counting: round(plan.compression(counting), 4) for counting in COUNTINGS}
    assert load_passport(directory).plan == summary
    assert "plan" not in load_passport(directory).graph


def test_a_machine_that_differs_in_one_fact_is_named_with_both_sides(directory: Path) -> None:
    passport = load_passport(directory)
    passport.require_here(directory, HERE)
    with pytest.raises(ArtifactError, match=r"was built for cuda 12, and this machine has cuda 13; rebuild it here"):
        passport.require_here(directory, HERE | {"cuda": "13"})
    with pytest.raises(ArtifactError, match=r"built for gpu L4, cuda 12, and this machine has gpu none, cuda none"):
        passport.read_engine(directory, {})


@pytest.mark.parametrize("name", ["spec.json", "tokenizer.json"])
class TestCompanions:
    def refused(self, directory: Path, name: str, message: str) -> None:
        passport = load_passport(directory)
        for check in (
            passport.require_companions,
            passport.require_whole,
            lambda where: passport.read_companion(where, name),
            lambda where: passport.read_engine(where, HERE),
        ):
            with pytest.raises(ArtifactError, match=message):
                check(directory)

    def test_another_one_is_refused(self, directory: Path, name: str) -> None:
        (directory / name).write_bytes((directory / name).read_bytes() + b" ")
        self.refused(directory, name, rf"{name} is not the one that the engine was built with")

    def test_one_that_is_gone_is_refused(self, directory: Path, name: str) -> None:
        (directory / name).unlink()
        self.refused(directory, name, rf"{name} is missing: the passport beside it names it")

    def test_one_that_came_later_is_refused(self, directory: Path, name: str) -> None:
        passport = load_passport(directory)
        others = {key: value for key, value in (passport.companions or {}).items() if key != name}
        replace(passport, companions=others).save(directory)
        self.refused(directory, name, rf"{name} was not there when the engine was built")
        (directory / name).unlink()
        load_passport(directory).require_whole(directory)
        assert load_passport(directory).read_companion(directory, name) is None

    def test_of_a_passport_without_their_hashes_any_is_read_and_it_says_so(self, directory: Path, name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_passport(directory).notice_coverage(directory)
        passport = replace(load_passport(directory), companions=None)
        (directory / name).write_text("{}")
        passport.require_whole(directory)
        assert passport.read_companion(directory, name) == "{}"
        assert passport.contents_sha256 is None
        with pytest.warns(
            Notice, match=r"covers the engine alone, so nothing says that spec\.json and tokenizer\.json"
        ):
            passport.notice_coverage(directory)
        (directory / name).write_bytes(b"\xff")
        with pytest.raises(ArtifactError, match=rf"{name}: not a JSON file \(it is not UTF-8 text\)"):
            passport.read_companion(directory, name)


def test_an_engine_that_was_built_without_companions_has_none(directory: Path) -> None:
    passport = replace(load_passport(directory), companions={})
    for name in ("spec.json", "tokenizer.json"):
        (directory / name).unlink()
    passport.require_whole(directory)
    with pytest.raises(ArtifactError, match=r"has no spec\.json"):
        covered_spec(directory, passport)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        covered_tokenizer(directory, passport)


def test_what_is_covered_is_said_in_words() -> None:
    assert replace(PASSPORT, companions={}).covers == "the engine and nothing beside it"
    assert replace(PASSPORT, companions={"spec.json": "0"}).covers == "the engine and spec.json"
    assert PASSPORT.covers == "the engine alone"


class TestEvidence:
    def test_as_the_build_wrote_it_it_is_read(self, directory: Path) -> None:
        passport = load_passport(directory)
        assert passport.read_evidence(directory, "log") == "its kernels \ufffd"
        assert passport.untied(directory, "log", "other") is None

    def test_another_one_proves_nothing(self, directory: Path) -> None:
        (directory / "log").write_bytes(LOG + b" sparse")
        with pytest.raises(ArtifactError, match="log is not the one that the build of this engine wrote"):
            load_passport(directory).read_evidence(directory, "log")

    def test_one_that_the_build_did_not_write_proves_nothing(self, directory: Path) -> None:
        (directory / "other").write_bytes(b"sparse")
        with pytest.raises(ArtifactError, match="other is none of what the build of this engine wrote"):
            load_passport(directory).read_evidence(directory, "other")

    def test_one_that_is_gone_unties_the_rest(self, directory: Path) -> None:
        (directory / "log").unlink()
        passport = load_passport(directory)
        assert passport.read_evidence(directory, "log") is None
        assert (passport.untied(directory, "log") or "").startswith("log is missing, and the passport names it")
        assert passport.untied(directory, "other") is None

    def test_of_a_passport_without_hashes_any_is_read_and_none_is_tied(self, directory: Path) -> None:
        passport = replace(load_passport(directory), evidence=None)
        (directory / "other").write_bytes(b"sparse")
        assert passport.read_evidence(directory, "other") == "sparse"
        assert "of before passports had the hashes of evidence" in (passport.untied(directory) or "")


class TestEngineFile:
    def test_one_that_is_swapped_after_the_check_is_not_loaded(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check = EnginePassport.require_here

        def swapped(passport: EnginePassport, where: Path, facts: dict[str, str]) -> None:
            check(passport, where, facts)
            (where / passport.engine).write_bytes(b"another")

        monkeypatch.setattr(EnginePassport, "require_here", swapped)
        with pytest.raises(ArtifactError, match=r"engine\.bin changed while it was read"):
            load_passport(directory).read_engine(directory, HERE)

    def test_one_that_is_not_of_its_passport_is_refused(self, directory: Path) -> None:
        (directory / "engine.bin").write_bytes(ENGINE + b".")
        with pytest.raises(ArtifactError, match=r"engine\.bin is not the engine of its passport"):
            load_passport(directory).require_whole(directory)
        (directory / "engine.bin").unlink()
        with pytest.raises(ArtifactError, match=r"engine\.bin is missing"):
            load_passport(directory).require_engine(directory)

    def test_a_link_out_of_its_directory_is_refused(self, directory: Path, tmp_path: Path) -> None:
        (directory / "engine.bin").rename(tmp_path / "elsewhere")
        (directory / "engine.bin").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ArtifactError, match="leads out of its directory"):
            load_passport(directory).read_engine(directory, HERE)

    @pytest.mark.parametrize("kind", ["inputs", "outputs"])
    def test_bindings_that_are_not_there_are_asked_for(self, kind: str) -> None:
        with pytest.raises(ArtifactError, match=f"does not say what the engine's {kind} are"):
            PASSPORT.tensors(kind)  # type: ignore[arg-type]  # both kinds there are


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0, and a machine has 1 or more"),
        ({"threads": MOST_THREADS + 1}, f"threads is {MOST_THREADS + 1}"),
        ({"shapes": [[1, 8]] * (MOST_SHAPES + 1)}, f"{MOST_SHAPES + 1} shapes; an engine keeps {MOST_SHAPES} at most"),
        ({"shapes": [[1, 0]]}, "of sizes from 1 to 1048576"),
        ({"shapes": [[2**20 + 1, 1]]}, "of sizes from 1 to 1048576"),
        ({"shapes": [[8]]}, "options"),
        ({"twin": 5}, "options"),
    ],
    ids=str,
)
def test_options_that_no_build_writes_are_refused(
    options: dict[str, object], message: str, edited: Callable[..., Path]
) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_passport(edited(options=options))


@pytest.fixture
def edited(directory: Path) -> Callable[..., Path]:
    """``edited(**fields)``: the directory with other fields in its passport."""

    def made(**fields: object) -> Path:
        file = directory / "passport.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
        return directory

    return made


def test_options_at_their_bounds_are_read(edited: Callable[..., Path]) -> None:
    for threads, shapes in ((1, [[1, 1]]), (MOST_THREADS, [[2**20, 1]] * MOST_SHAPES)):
        passport = load_passport(edited(options={"threads": threads, "shapes": shapes, "twin": "dense"}))
        assert (passport.threads, passport.twin) == (threads, "dense")
        assert passport.shapes == tuple(map(tuple, shapes))


@pytest.mark.parametrize("name", ["", ".", "..", "../engine.bin", "sub/engine.bin", "a\0b", "é" * 128])
def test_an_engine_by_what_is_no_name_of_a_file_is_refused(name: str, edited: Callable[..., Path]) -> None:
    """A server looks at the file while it watches: a name that no file can have ended its watch."""
    with pytest.raises(ArtifactError, match=r"passport\.json: names an engine outside its directory, or by what is no"):
        load_passport(edited(engine=name))
    assert signature(edited(engine=name)) is not None, "a change like any other, refused when it is loaded"


def test_an_engine_may_have_the_longest_name_that_there_is(edited: Callable[..., Path]) -> None:
    assert load_passport(edited(engine="é" * 127 + "x")).engine == "é" * 127 + "x"


def test_the_command_that_rebuilds_has_profiles_shapes_and_flags() -> None:
    passport = replace(
        PASSPORT,
        backend="trt",
        profiles=(Profile((1, 2), (3, 4), (5, 6)), Profile((1, 1), (1, 1), (2, 2))),
        options={"shapes": [[1, 8], [2, 16]], "sparse": "always", "fuse": False},
    )
    assert passport.rebuild_command() == (
        "nxm build model.onnx --backend trt --profile 1x2,3x4,5x6 --profile 1x1,1x1,2x2 --shape 1x8 --shape 2x16 "
        "--sparse always --no-fuse --out ENGINE_DIR"
    )
    for older, told in ((False, "--sparse never "), (True, ""), (None, "")):
        of_older = replace(passport, profiles=(), options={} if older is None else {"sparse": older})
        assert of_older.rebuild_command() == f"nxm build model.onnx --backend trt {told}--out ENGINE_DIR"
    plain = replace(passport, profiles=(), options={"sparse": "auto", "fuse": True})
    assert plain.rebuild_command() == "nxm build model.onnx --backend trt --out ENGINE_DIR"
