"""The files beside an engine that a sparsity report is judged by: read whole, or refused by file and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.base import Profile
from engines.sparsity.build_evidence import (
    MEASURED_SCHEMA,
    read_evidence,
)
from engines.sparsity.engine_report import read_sparsity_report
from engines.tensorrt import backend
from nxm_export.errors import ArtifactError, EngineError, ParityError
from nxm_export.pipeline.engine_sparsity import require_sparse
from nxm_export.pipeline.inspection import inspect_engine
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import as_object, encode, entry_at
from tests.support.sparsity_evidence import (
    EVIDENCE,
    MEASURED,
    SPARSE_GEMM,
    engine_directory,
    measured,
    tie,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An engine directory that proves its one matrix sparse."""
    return engine_directory(tmp_path)


def edit(file: Path, change: Callable[[Any], object]) -> None:
    """Change a file beside an engine as if the build had written it so."""
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    tie(file.parent)


def inspected(data: dict[str, object]) -> dict[str, object]:
    """TensorRT's own report in a ``layers.json``."""
    return as_object(entry_at(data, "profiles", 0, "information"))


def test_a_report_is_made_of_all_that_lies_there(directory: Path) -> None:
    (weight,) = read_sparsity_report(directory).weights
    assert (weight.chosen, weight.kernel) == (True, SPARSE_GEMM)
    evidence = read_evidence(directory)
    assert evidence.layer_ms == {"node_myl0_1": 0.5}
    assert evidence.running is None
    report = read_sparsity_report(directory, running=["another kernel"])
    assert report.weights[0].reason == "contradiction"


def test_the_time_saved_is_the_twins_less_the_engines(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    twin = dense_twin(tmp_path_factory)
    assert read_sparsity_report(directory, twin).weights[0].saved_ms == 0.25


def dense_twin(tmp_path_factory: pytest.TempPathFactory, **changes: Any) -> Path:
    """The directory of the same engine without sparse kernels, whose layer takes longer."""
    twin = engine_directory(tmp_path_factory.mktemp("twin"), b"its twin")
    tie(twin, **{"options": {"sparse": "never"}, **changes})
    measured(twin, layer_ms={"node_myl0_1": 0.75})
    return twin


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"sparse": "auto"}}, "it was built with sparse kernels"),
        ({"options": {}}, "it was built with sparse kernels"),
        ({"onnx_sha256": "1" * 64}, "its graph is 1111"),
        ({"requires": {"gpu": "L4"}}, "its machine is {'gpu': 'L4'}, and not {}"),
        ({"profiles": (Profile((1, 1), (1, 8), (1, 8)),)}, "its profiles is"),
        *(
            ({"options": {"sparse": "never", key: value}}, f"it was built with {key} {value}, and not None")
            for key, value in {"level": 5, "workspace_bytes": 9, "build_route": "other", "fuse": True}.items()
        ),
    ],
)
def test_another_engine_than_the_dense_twin_gives_no_time_saved(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], message: str
) -> None:
    twin = dense_twin(tmp_path_factory, **changes)
    with pytest.raises(EngineError, match=f"is no dense twin of .*{message}"):
        read_sparsity_report(directory, twin)


def test_times_of_two_shapes_give_no_time_saved(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    twin = dense_twin(tmp_path_factory)
    measured(twin, shape=(1, 8))
    with pytest.raises(EngineError, match=r"was measured at 8x128 .* at 1x8; build both with the same --profile"):
        read_sparsity_report(directory, twin)


def test_a_twin_that_was_not_measured_gives_no_time_saved(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    twin = dense_twin(tmp_path_factory)
    for measurement in (twin / "measured.json", directory / "measured.json"):
        measurement.rename(measurement.with_suffix(".away"))
        assert read_sparsity_report(directory, twin).weights[0].saved_ms is None
        measurement.with_suffix(".away").rename(measurement)


def test_a_twin_that_is_not_the_engine_of_its_passport_is_refused(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    twin = dense_twin(tmp_path_factory)
    (twin / "model.engine").write_bytes(b"another engine")
    (twin / "measured.json").unlink()
    with pytest.raises(ArtifactError, match="is not the engine of its passport"):
        read_sparsity_report(directory, twin)


def test_the_layers_of_a_build_log_are_those_of_the_only_profile(directory: Path) -> None:
    """A build without an inspector's report."""
    (directory / "layers.json").unlink()
    (directory / "measured.json").unlink()
    line = f"Name: node_myl0_1, LayerType: gemm, Inputs: [], Outputs: [], TacticName: {SPARSE_GEMM}, StreamId: 0, "
    (directory / "build.log").write_text(f"[V] {line}Metadata: [ONNX Layer: node]\n")
    tie(directory)
    evidence = read_evidence(directory)
    assert (evidence.profiles, evidence.layer_ms, evidence.shape, evidence.running) == (frozenset({0}), {}, None, None)
    (weight,) = read_sparsity_report(directory).weights
    assert (weight.chosen, weight.kernel) == (True, SPARSE_GEMM)


def test_a_profile_that_nobody_inspected_leaves_its_kernels_unknown(directory: Path) -> None:
    small = Profile((1, 1), (1, 8), (1, 8))
    tie(directory, profiles=(small, small))
    assert read_evidence(directory).profiles == {0, 1}
    (weight,) = read_sparsity_report(directory).weights
    assert (weight.chosen, weight.reason) == (None, "unknown")
    assert "profile 1 does not name this product" in weight.detail


def test_a_profilers_kernels_are_taken_from_the_measurement(directory: Path) -> None:
    measured(directory, kernels=("another kernel",))
    assert read_sparsity_report(directory).weights[0].reason == "contradiction"


def test_a_measurement_without_kernels_and_facts_of_the_former_schema_are_read(directory: Path) -> None:
    expected = read_sparsity_report(directory)
    edit(directory / "measured.json", lambda data: (data.pop("kernels"), data.pop("schema")))
    edit(directory / "layers.json", lambda data: data.pop("schema"))
    edit(directory / "weights.json", lambda data: data.update(schema="nxm-truth/1"))
    assert read_sparsity_report(directory) == expected


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weights.json", lambda data: data.update(schema="nxm-plan/1"), "weights.json: not a nxm-weights/1 file"),
        ("weights.json", lambda data: data.update(has_gpu="no"), "weights.json: has_gpu: Expected `bool`, got `str`"),
        ("weights.json", lambda data: data["facts"][0].pop("k"), r"weights.json: facts\[0\]: .*required field `k`"),
        ("weights.json", lambda data: data["facts"][0].update(q=1), r"weights.json: unknown field facts\[0\]\.q"),
        ("layers.json", lambda data: data["profiles"][0].update(shape=[8]), r"layers.json: profiles\[0\]\.shape: "),
        ("layers.json", lambda data: data.update(more=1), "layers.json: unknown field more"),
        ("layers.json", lambda data: data.update(schema="nxm-layers/9"), "schema nxm-layers/9 is not the nxm-layers/1"),
        ("layers.json", lambda data: inspected(data).update(Layers=[1]), r"information: Layers\[0\]: .*got `int`"),
        ("layers.json", lambda data: inspected(data).update(Layers=None), r"information: Layers: .*got `null`"),
        (
            "layers.json",
            lambda data: as_object(entry_at(inspected(data), "Layers", 0)).update(Inputs=None),
            r"Layers\[0\]\.Inputs: .*`null`",
        ),
        ("measured.json", lambda data: data.update(schema="nxm-plan/1"), "measured.json: not a nxm-measured/1 file"),
        ("measured.json", lambda data: data.update(layer_ms={"a": "fast"}), "measured.json: layer_ms.*got `str`"),
        ("measured.json", lambda data: data.update(rounds=float("nan")), "measured.json: not valid JSON .*NaN"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_field(
    directory: Path, name: str, change: Callable[[Any], object], message: str
) -> None:
    edit(directory / name, change)
    with pytest.raises(ArtifactError, match=message):
        read_sparsity_report(directory)


def test_a_measurement_of_another_engine_is_refused(directory: Path) -> None:
    assert read_evidence(directory).layer_ms == {"node_myl0_1": 0.5}
    (directory / "measured.json").write_text(encode(MEASURED, MEASURED_SCHEMA))
    with pytest.raises(ArtifactError, match=r"measured\.json: of another engine .*measure again"):
        read_evidence(directory)


def asked(directory: Path) -> tuple[Callable[[], object], ...]:
    """Every way to ask which kernels run."""
    return (
        lambda: require_sparse(directory, 1.0),
        lambda: inspect_engine(directory),
        lambda: backend.inspect(directory),
        lambda: read_sparsity_report(directory),
    )


def test_what_lies_beside_an_engine_proves_nothing_of_another_file(directory: Path) -> None:
    require_sparse(directory, 1.0)
    assert inspect_engine(directory).sparsity == read_sparsity_report(directory)
    (directory / "model.engine").write_bytes(b"another engine, dense perhaps")
    for ask in asked(directory):
        with pytest.raises(ArtifactError, match="is not the engine of its passport"):
            ask()


@pytest.mark.parametrize("name", EVIDENCE)
def test_evidence_that_is_not_what_the_build_wrote_is_refused(directory: Path, name: str) -> None:
    with (directory / name).open("a") as stream:
        stream.write("\n")
    for ask in asked(directory):
        with pytest.raises(
            ArtifactError, match=rf"{name} is not the one that the build of this engine wrote .*restore"
        ):
            ask()


@pytest.mark.parametrize("name", ["layers.json", "build.log"])
def test_evidence_that_the_build_did_not_write_is_refused(directory: Path, name: str) -> None:
    hashes = {other: file_hash(directory / other) for other in EVIDENCE if other != name}
    tie(directory, evidence=hashes)
    for ask in asked(directory):
        with pytest.raises(ArtifactError, match=rf"{name} is none of what the build of this engine wrote.*remove it"):
            ask()


def test_without_the_inspectors_report_of_its_passport_nothing_is_proven(directory: Path) -> None:
    """The log alone says sparse, and the report that is gone may have said dense."""
    (directory / "layers.json").unlink()
    (weight,) = read_sparsity_report(directory).weights
    assert (weight.chosen, weight.reason) == (None, "untied")
    assert "layers.json is missing, and the passport names it" in weight.detail
    with pytest.raises(ParityError, match=r"0\.0% of the planned-sparse weights provably run sparse.*1 x untied"):
        require_sparse(directory, 0.01)


def test_a_build_log_that_is_gone_takes_no_proof_away(directory: Path) -> None:
    (directory / "build.log").unlink()
    require_sparse(directory, 1.0)


def test_a_passport_without_hashes_of_evidence_proves_nothing_and_says_so(directory: Path) -> None:
    tie(directory, evidence=None)
    edited = json.loads((directory / "passport.json").read_text())
    del edited["evidence"]  # as passports were written before
    (directory / "passport.json").write_text(json.dumps(edited))
    (weight,) = read_sparsity_report(directory).weights
    assert (weight.chosen, weight.reason, weight.saved_ms) == (None, "untied", None)
    assert "its passport is of before passports had the hashes of evidence" in weight.detail
    with pytest.raises(ParityError, match="1 x untied"):
        require_sparse(directory, 0.01)


def test_without_facts_there_is_no_report(directory: Path) -> None:
    (directory / "weights.json").unlink()
    with pytest.raises(ArtifactError, match=r"weights\.json is missing: .* build it again"):
        read_sparsity_report(directory)
