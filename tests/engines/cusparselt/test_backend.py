"""The verbs on a stand-in of a GPU machine, and what they refuse on this one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import pytest

from engines.base import BuildOptions, LoadOptions, Profile, backend
from engines.cusparselt import backend as cusparselt
from engines.cusparselt.backend import CusparseltEngine, build_on, load_on, profile_on
from engines.cusparselt.executor import Executor
from engines.cusparselt.machine import Machine
from engines.cusparselt.profiling import KERNELS_FILE, KernelRun, ProfiledRun, read_profile, save_profile
from engines.cusparselt.stand_in import IntegerReferenceKernels
from engines.passport import load_passport
from engines.sparsity.sparsity_report import SparsityReport, WeightSparsity
from nxm_export.contract.io_spec import load_spec
from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_sparsity import require_sparse
from nxm_export.pipeline.inspection import inspect_path
from nxm_export.storage.hashing import file_hash
from tests.engines.cusparselt.machines import FASTER, SPARSE_KERNEL, Named, Priced, machine
from tests.support import baked, onnx_text, tiny

if TYPE_CHECKING:
    from torch import Tensor

DENSE_KERNEL = "sm90_xmma_gemm_i8i32_i8i32_i32_tn_n_tilesize128x128x128"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tiny_graph: Callable[..., Path]) -> Path:
    """An engine of a stand-in on which sparse products are faster; read it only."""
    out = tmp_path_factory.mktemp("engine")
    graph = tiny_graph("bert", "inputs-outputs", "trt")
    build_on(machine(Priced(2.0, FASTER)), graph / "model.onnx", out)
    return out


@pytest.fixture
def engine(directory: Path) -> Iterator[CusparseltEngine]:
    with load_on(machine(), directory) as loaded:
        yield loaded


def test_the_directory_and_its_passport_say_what_made_it(directory: Path, tiny_graph: Callable[..., Path]) -> None:
    assert {path.name for path in directory.iterdir()} == {
        *("model.safetensors", "passport.json", "spec.json", "tokenizer.json", "origin.json", "weights.json"),
    }
    passport = load_passport(directory)
    assert passport.backend == "cusparselt"
    assert passport.device["kind"] == "stand-in"
    assert passport.requires["gpu"] == "stand-in of tests"
    assert passport.options["integer_products"] == 6 * tiny.LAYERS
    assert passport.options["attention"] == {
        "fused": tiny.LAYERS,
        "in parts": 0,
        "operands on their INT8 grid": tiny.LAYERS,
    }
    assert passport.profiles[0].maximum == (32, tiny.POSITIONS)
    assert load_spec(directory) == load_spec(tiny_graph("bert", "inputs-outputs", "trt"))


def test_it_answers_as_the_engine_of_onnx_runtime(engine: CusparseltEngine, tiny_engine: Callable[..., Path]) -> None:
    """One checkpoint: float16 here, float32 there."""
    with backend("ort").load(tiny_engine("ort")) as other:
        for batch, sequence, padding in ((1, 1, 0), (5, 7, 3), (2, tiny.POSITIONS, 0)):
            feeds = baked.feeds("bert", batch, sequence, padding=padding)
            mine, theirs = engine.run(feeds)["logits"], other.run(feeds)["logits"]
            assert mine.dtype == np.float32
            assert mine.flags.writeable
            # A trained tiny model has logits of some units; one code that moves by a step changes them by some 0.05.
            np.testing.assert_allclose(mine, theirs, atol=0.1)


def test_outputs_are_the_callers_own_and_inputs_stay(engine: CusparseltEngine) -> None:
    feeds = baked.feeds("bert", 2, 9, padding=2)
    before = {name: array.copy() for name, array in feeds.items()}
    first = engine.run(feeds)["logits"]
    kept = first.copy()
    engine.run(baked.feeds("bert", 2, 9, seed=3))
    engine.run(feeds)["logits"][:] = 7.0
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(engine.run(feeds)["logits"], kept)
    for name, array in feeds.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda feeds: feeds.pop("attention_mask"), "the engine takes input_ids"),
        (lambda feeds: feeds.update(baked.feeds("bert", 1, tiny.POSITIONS + 1)), "longer than the model's"),
        (lambda feeds: feeds.update(input_ids=feeds["input_ids"] + 1000), "the model takes 0 to 35"),
    ],
)
def test_what_the_model_has_no_answer_for_is_refused(
    engine: CusparseltEngine, change: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    feeds = baked.feeds("bert", 2, 5)
    change(feeds)
    for run in (engine.run, engine.timer):
        with pytest.raises(EngineError, match=message):
            run(feeds)


def test_a_closed_engine_says_so(directory: Path) -> None:
    with load_on(machine(), directory) as engine:
        assert engine.timer(baked.feeds("bert", 1, 3))() > 0
    with pytest.raises(EngineError, match="was closed"):
        engine.run(baked.feeds("bert", 1, 3))


def test_a_queue_of_runs_is_timed_as_a_whole(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds, replays = baked.feeds("bert", 1, 3), list[int]()
    monkeypatch.setattr(Executor, "replayer", lambda *_: lambda: replays.append(1))
    with load_on(machine(), directory) as engine:
        engine.queue_timer(feeds, 5)()
        assert len(replays) == 5
        engine.timer(feeds)()
    assert len(replays) == 6


def test_it_says_whether_a_shape_is_launched_as_a_graph(directory: Path) -> None:
    with load_on(machine(), directory) as engine:
        engine.timer(baked.feeds("bert", 1, 3))
        assert engine.launches_graph(baked.feeds("bert", 1, 3))
        assert engine.launches_graph(baked.feeds("bert", 1, 4)), "which both run as"
        assert not engine.launches_graph(baked.feeds("bert", 1, 5))


def test_runs_of_many_shapes_share_few_graphs_and_give_what_each_gives_alone(
    engine: CusparseltEngine, tiny_engine: Callable[..., Path]
) -> None:
    """Batches of a server have any number of rows."""
    ran = set()
    with backend("ort").load(tiny_engine("ort")) as other:
        for rows in range(1, 18):
            feeds = baked.feeds("bert", rows, 5 + rows, padding=2)
            ran.add(engine.compiled_shape(feeds))
            logits = engine.run(feeds)["logits"]
            np.testing.assert_allclose(logits, other.run(feeds)["logits"], atol=0.1)
    assert engine._open()._plans.keys() == {tuple([shape] * len(engine.inputs)) for shape in ran}
    assert max(shape[0] * shape[1] for shape in ran if shape) <= 20 * 24


def test_answers_for_every_token_are_cut_to_their_tokens(tmp_path: Path) -> None:
    model = tiny.write_model("bert", tmp_path / "model", head="token-classification", layers=1)
    graph = export(model, tmp_path / "graph", target="trt", task="token-classification").path
    (tmp_path / "engine").mkdir()
    build_on(machine(), graph, tmp_path / "engine", BuildOptions(profiles=[Profile((1, 1), (2, 8), (2, 8))]))
    with load_on(machine(), tmp_path / "engine") as engine:
        feeds = baked.feeds("bert", 9, 5, padding=1)
        assert engine.compiled_shape(feeds) == (10, 8)
        assert engine.run(feeds)["logits"].shape[:2] == (9, 5)


def test_it_works_when_copied_alone(directory: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(directory, tmp_path / "copied alone")
    with load_on(machine(), copied) as engine:
        assert engine.run(baked.feeds("bert", 1, 4))["logits"].shape == (1, 2)


def test_another_gpu_is_refused_before_anything_is_read(directory: Path) -> None:
    other = Machine(IntegerReferenceKernels(), {**machine().facts, "gpu": "NVIDIA H100", "cusparselt": "0.8.1"})
    with pytest.raises(ArtifactError, match=r"built for cusparselt 0.8.0, gpu stand-in of tests, .* H100; rebuild it"):
        load_on(other, directory)


def test_a_changed_byte_is_refused(directory: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(directory, tmp_path / "copy")
    data = bytearray((copied / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "model.safetensors").write_bytes(data)
    for verb in (lambda: load_on(machine(), copied), lambda: cusparselt.inspect(copied)):
        with pytest.raises(ArtifactError, match="is not the engine of its passport"):
            verb()


def test_no_verb_takes_the_stand_in(directory: Path, tmp_path: Path, tiny_graph: Callable[..., Path]) -> None:
    """Without a GPU there is no engine, and one of a stand-in is none."""
    graph = tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx"
    for verb in (
        lambda: cusparselt.build(graph, tmp_path),
        lambda: cusparselt.load(directory, LoadOptions()),
        lambda: cusparselt.profile(directory),
    ):
        with pytest.raises(EngineUnavailable, match=r"no engine of cusparselt can be .* here: .*cusparselt.md"):
            verb()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(level=3), "--level is for TensorRT"),
        (BuildOptions(workspace_bytes=1, build_route="x"), "--workspace, --build-route is for TensorRT"),
    ],
)
def test_options_of_tensorrt_are_refused(tmp_path: Path, options: BuildOptions, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        build_on(machine(), tmp_path / "none.onnx", tmp_path, options)


def test_what_torch_cannot_run_is_refused_when_it_is_built(tmp_path: Path) -> None:
    text = "g (float[2,8] x) => (float[2,8] y) <int64[2] n = {3,5}> { z = Reshape(x, n) y = Abs(z) }"
    file = onnx_text.save(text, tmp_path / "g.onnx")
    with pytest.raises(EngineError, match=r"g.onnx: it cannot be run by torch: shape"):
        build_on(machine(), file, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("input_ids", "other_ids", "reads 'input_ids', which nothing makes|reads 'other_ids'"),
        ("LayerNormalization", "LayerNormalizatioN", "there is no LayerNormalizatioN"),
        ('\\"output\\": \\"int8\\"', '\\"output\\": \\"int9\\"', "writes 'int9'"),
        ("sparse fused (M, N)", "sparse fused (N, N)", "'sparse fused .N, N.' is no form"),
        ('\\"k\\": 32', '\\"k\\": 33', r"has no tensor .* of \(32, 33\)|of \(64, 33\)"),
        ('\\"logits\\"', '\\"digits\\"', "nothing makes its output 'digits'|no tensor|reads"),
    ],
)
def test_a_program_that_does_not_fit_is_refused(
    directory: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    """With a passport that says it is the right one: what is written in an engine file is never taken on trust."""
    copied = shutil.copytree(directory, tmp_path / "copy")
    file = copied / "model.safetensors"
    data = file.read_bytes()
    assert old.encode() in data
    assert len(old) == len(new)
    file.write_bytes(data.replace(old.encode(), new.encode(), 1))
    passport = dataclasses.replace(load_passport(copied), engine_sha256=file_hash(file))
    passport.save(copied)
    with pytest.raises(ArtifactError, match=message):
        load_on(machine(), copied)


def test_what_torch_says_of_a_failure_is_an_error_of_ours(directory: Path) -> None:
    class Full(IntegerReferenceKernels):
        def dense(self, x: Tensor, weight: Tensor) -> Tensor:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

        def sparse(self, *arguments: object, **options: object) -> Tensor:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with load_on(machine(Full()), directory) as engine:
        for run in (engine.run, engine.timer):
            with pytest.raises(EngineError, match="torch failed: CUDA out of memory"):
                run(baked.feeds("bert", 1, 4))


def test_a_gpu_that_does_not_hold_the_weights_is_an_error_of_ours(
    directory: Path, tmp_path: Path, tiny_graph: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    graph = tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx"
    monkeypatch.setattr("engines.cusparselt.products._room", full)
    with pytest.raises(EngineError, match=r"torch failed: CUDA out of memory"):
        load_on(machine(), directory)
    with pytest.raises(EngineError, match=r"a matrix of 32 x 32 failed .*: CUDA out of memory"):
        build_on(machine(), graph, tmp_path)
    with pytest.raises(EngineError, match=r"it cannot be run by torch: CUDA out of memory"):
        build_on(machine(), graph, tmp_path, BuildOptions(sparse="never"))
    assert not [*tmp_path.iterdir()]


class TestSparsity:
    """What is sparse is what the profiler saw."""

    def report(self, directory: Path) -> SparsityReport:
        return cusparselt.inspect(directory).sparsity

    def planned(self, directory: Path) -> list[WeightSparsity]:
        """The matrices that were planned: those of the head are not."""
        return [weight for weight in self.report(directory).weights if weight.planned_sparse]

    def profiled(
        self, directory: Path, tmp_path: Path, kernel: str, *, replayed: tuple[str, ...] | None = None, rows: int = 1024
    ) -> list[WeightSparsity]:
        copied = shutil.copytree(directory, tmp_path / "copy")
        nodes = [weight.node for weight in self.planned(copied)]
        runs = {node: (KernelRun("void quantize", 1.0), KernelRun(kernel, 2.0)) for node in nodes}
        sha256 = load_passport(copied).engine_sha256
        save_profile(copied, ProfiledRun(sha256, (rows // 32, 32), runs, replayed))
        return self.planned(copied)

    def test_without_a_profile_nothing_is_sparse(self, directory: Path) -> None:
        report = self.report(directory)
        assert report.counts == {"unknown": 6 * tiny.LAYERS, "not-planned": 2}
        assert report.sparse_share == 0.0
        assert "no run was profiled" in report.weights[0].detail
        assert "32 rows: sparse 1.0 us, dense 2.0 us" in report.weights[0].detail
        with pytest.raises(Exception, match=r"0.0% of the planned-sparse weights provably run sparse"):
            require_sparse(directory, 0.5)

    def test_a_sparse_kernel_that_ran_is_the_proof(self, directory: Path, tmp_path: Path) -> None:
        for weight in self.profiled(directory, tmp_path, SPARSE_KERNEL, replayed=(SPARSE_KERNEL,)):
            assert weight.chosen is True
            assert weight.kernel == f"void quantize | {SPARSE_KERNEL}"
            assert weight.saved_ms == pytest.approx(0.001)
            assert weight.detail.startswith("profiled at 1024 rows; 32 rows: sparse")
        assert self.report(tmp_path / "copy").sparse_share == 1.0
        require_sparse(tmp_path / "copy", 1.0)

    def test_facts_that_are_not_those_of_the_build_prove_nothing(self, directory: Path, tmp_path: Path) -> None:
        self.profiled(directory, tmp_path, SPARSE_KERNEL)
        copied = tmp_path / "copy"
        replace(load_passport(copied), evidence=None).save(copied)  # as passports were written before
        weights = self.planned(copied)
        assert {(weight.chosen, weight.reason) for weight in weights} == {(None, "untied")}
        assert "build it again" in weights[0].detail
        replace(load_passport(copied), evidence=load_passport(directory).evidence).save(copied)
        text = (copied / "weights.json").read_text()
        (copied / "weights.json").write_text(text.replace('"sparse_along_k": false', '"sparse_along_k": true') + " ")
        with pytest.raises(ArtifactError, match=r"weights\.json is not the one that the build of this engine wrote"):
            require_sparse(copied, 0.5)

    def test_one_kernel_proves_no_two_matrices_of_one_name(self, directory: Path, tmp_path: Path) -> None:
        self.profiled(directory, tmp_path, SPARSE_KERNEL)
        copied = tmp_path / "copy"
        facts = json.loads((copied / "weights.json").read_text())
        first, second = (fact for fact in facts["facts"][:2])
        second["node"] = first["node"]  # as of a product that this engine runs in float
        (copied / "weights.json").write_text(json.dumps(facts))
        evidence = {"weights.json": file_hash(copied / "weights.json")}
        replace(load_passport(copied), evidence=evidence).save(copied)
        outcomes = [(weight.chosen, weight.reason) for weight in self.planned(copied)]
        assert outcomes[:2] == [(None, "ambiguous")] * 2
        assert set(outcomes[2:]) == {(True, None)}

    def test_a_step_that_runs_sparse_and_a_graph_that_does_not_contradict_each_other(
        self, directory: Path, tmp_path: Path
    ) -> None:
        weights = self.profiled(directory, tmp_path, SPARSE_KERNEL, replayed=(DENSE_KERNEL,))
        assert {(weight.chosen, weight.reason) for weight in weights} == {(None, "contradiction")}

    @pytest.mark.parametrize("kernel", [DENSE_KERNEL, "anonymous", "sm90_xmma_sparse_gemm_f16f16_f16f32"])
    def test_a_name_that_does_not_say_sparse_int8_proves_nothing(
        self, directory: Path, tmp_path: Path, kernel: str
    ) -> None:
        weights = self.profiled(directory, tmp_path, kernel)
        assert {(weight.chosen, weight.reason) for weight in weights} == {(None, "unknown")}

    def test_dense_that_is_faster_is_the_measured_reason(self, tmp_path: Path, tiny_graph: Callable[..., Path]) -> None:
        graph = tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx"
        build_on(machine(Priced(0.5, FASTER)), graph, tmp_path)
        weights = self.planned(tmp_path)
        assert {(w.chosen, w.reason, w.eligible) for w in weights} == {(False, "dense-faster", True)}
        assert "1536 rows: sparse 1.0 us, dense 0.5 us" in weights[0].detail

    def test_a_time_that_is_of_no_cuda_graph_says_so_and_is_subtracted_from_none_that_is(
        self, tmp_path: Path, tiny_graph: Callable[..., Path]
    ) -> None:
        graph = tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx"
        kernels = Priced(0.5, FASTER, refused=("int8", "float16", "int32"))
        for name in ("dense", "sparse"):
            (tmp_path / name).mkdir()
        build_on(machine(kernels), graph, tmp_path / "dense")
        weight = self.planned(tmp_path / "dense")[0]
        assert "1536 rows: sparse 1.0 us (launched one by one), dense 0.5 us" in weight.detail
        assert weight.saved_ms == 0.0  # of the dense form that was chosen
        build_on(machine(Priced(2.0, FASTER, refused=kernels.refused)), graph, tmp_path / "sparse")
        weight = self.planned(tmp_path / "sparse")[0]
        assert "1536 rows: sparse 1.0 us (launched one by one), dense 2.0 us" in weight.detail
        assert weight.saved_ms is None

    def test_forms_that_are_not_right_are_the_reason(self, tmp_path: Path, tiny_graph: Callable[..., Path]) -> None:
        graph = tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx"
        build_on(machine(Priced(2.0, {})), graph, tmp_path)
        weights = self.planned(tmp_path)
        assert {(weight.chosen, weight.reason) for weight in weights} == {(False, "no-kernel")}
        assert "no int32 here" in weights[0].detail

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (BuildOptions(sparse="never", twin="int8-dense"), (False, "flag-off")),
            (BuildOptions(sparse="always"), (None, "unknown")),
        ],
    )
    def test_never_and_always(
        self, tmp_path: Path, tiny_graph: Callable[..., Path], options: BuildOptions,
        expected: tuple[bool | None, str],
    ) -> None:  # fmt: skip
        graph = tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx"
        passport = build_on(machine(Priced(0.5, FASTER)), graph, tmp_path, options)
        assert passport.twin == options.twin
        assert f" --sparse {options.sparse} " in passport.rebuild_command()
        assert {(weight.chosen, weight.reason) for weight in self.planned(tmp_path)} == {expected}

    def test_a_float_twin_has_no_products_of_integers(self, tmp_path: Path, tiny_graph: Callable[..., Path]) -> None:
        passport = build_on(machine(), tiny_graph("bert", "float", "trt") / "model.onnx", tmp_path)
        assert passport.options["integer_products"] == 0
        report = self.report(tmp_path)
        assert {weight.chosen for weight in report.weights} == {False}
        with load_on(machine(), tmp_path) as engine:
            assert engine.run(baked.feeds("bert", 2, 5))["logits"].shape == (2, 2)

    def test_a_profile_of_another_engine_is_refused(self, directory: Path, tmp_path: Path) -> None:
        copied = shutil.copytree(directory, tmp_path / "copy")
        save_profile(copied, ProfiledRun("0" * 64, (8, 128), {}, None))
        with pytest.raises(ArtifactError, match="of another engine"):
            cusparselt.inspect(copied)

    def test_profiling_the_stand_in_sees_no_kernel(self, directory: Path, tmp_path: Path) -> None:
        """The profiler runs, every product has its range, and a CPU has no kernels: unknown stays unknown."""
        copied = shutil.copytree(directory, tmp_path / "copy")
        profile_on(machine(), copied)
        run = read_profile(copied, load_passport(copied).engine_sha256)
        assert run is not None
        assert run.shape == (8, tiny.POSITIONS)
        assert len(run.products) == 6 * tiny.LAYERS
        assert not any(run.products.values())
        assert run.replayed == ()
        assert {(weight.chosen, weight.reason) for weight in self.planned(copied)} == {(None, "unknown")}
        assert (copied / KERNELS_FILE).is_file()

    def test_inspection_refuses_what_this_engine_has_in_itself(self, directory: Path, tmp_path: Path) -> None:
        (tmp_path / "kernels").write_text(SPARSE_KERNEL)
        for kernels, twin in ((tmp_path / "kernels", None), (None, directory)):
            with pytest.raises(EngineError, match="leave --twin and --kernels out"):
                inspect_path(directory, kernels=kernels, twin=twin)
        assert inspect_path(directory).to_dict()["backend"] == "cusparselt"


def test_no_fuse_compiles_nothing(tmp_path: Path, tiny_graph: Callable[..., Path]) -> None:
    kernels = Named()
    graph = tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx"
    passport = build_on(machine(kernels), graph, tmp_path, BuildOptions(fuse=False))
    with load_on(machine(kernels), tmp_path) as engine:
        engine.run(baked.feeds("bert", 1, 4))
    assert not kernels.compiled
    assert "--no-fuse" in passport.rebuild_command()


def test_facts_are_a_frozen_record(directory: Path) -> None:
    facts = cusparselt.inspect(directory)
    assert dataclasses.is_dataclass(facts)
    assert facts.to_dict()["integer_products"] == 6 * tiny.LAYERS
