"""Does an engine run sparse: its sparsity report, the gate on proven sparse kernels, and the times of its layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.errors import ArtifactError, EngineError
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.json_files import encode
from nxm_export.storage.unreadable import unreadable

if TYPE_CHECKING:
    from engines.sparsity.sparsity_report import SparsityReport


def require_sparse(path: Path, share: float, *, twin: Path | None = None, kernels: Path | None = None) -> None:
    """Raise `ParityError` unless `share` of the planned-sparse weights provably run sparse in the engine at `path`."""
    from engines.base import backend
    from engines.passport import load_passport
    from nxm_export.pipeline.sparsity_twins import SPARSE, is_twins, twin_directory

    if is_twins(path):
        path = twin_directory(path, SPARSE)
    if not path.is_dir() or not backend(load_passport(path).backend).CAPABILITIES.sparse_kernels:
        raise EngineError(
            f"{path}: only engines for GPUs run sparse kernels; give an engine directory of --backend trt or cusparselt"
        )
    sparsity_of(path, twin, kernels).require_sparse(share)


def sparsity_of(directory: Path, twin: Path | None = None, kernels: Path | None = None) -> SparsityReport:
    """The sparsity report of an engine directory (see `engines.sparsity.judgement`).

    `kernels` is a file with one name of a kernel a line; `ArtifactError` where it is missing, and for an engine file
    that is not the one of its passport. Raises `EngineError` for `kernels` and for `twin` where the engine's backend
    profiles its kernels itself.
    """
    from engines.base import ProfiledFacts, backend
    from engines.passport import load_passport
    from engines.sparsity.engine_report import read_sparsity_report

    if profiles_kernels(directory):
        if twin is not None or kernels is not None:
            raise EngineError(
                f"{directory}: leave --twin and --kernels out: this engine has the times of both kinds of kernels from "
                "its build, and the names of kernels from `nxm inspect --measure`"
            )
        facts = backend(load_passport(directory).backend).inspect(directory)
        assert isinstance(facts, ProfiledFacts)
        return facts.sparsity
    running = None
    if kernels is not None:
        if not kernels.is_file():
            raise ArtifactError(f"{kernels}: no such file; give a text file with one kernel name per line")
        running = _kernel_names(kernels)
    return read_sparsity_report(directory, twin, running)


def _kernel_names(file: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{unreadable(file, error)}; give a text file with one kernel name per line") from error
    return [line.strip() for line in lines if line.strip()]


def measure_layers(directory: Path, rounds: int = 20) -> None:
    """Time every layer of an engine at its first profile's best shape, and write ``measured.json`` beside it; for a
    backend that profiles kernels, write what it finds."""
    from engines.base import LayerTimedEngine, ProfiledBackend, backend
    from engines.benchmark.latency import feeds_for
    from engines.passport import load_passport
    from engines.sample_inputs import nearest_shape
    from engines.sparsity.build_evidence import MEASURED_FILE, MEASURED_SCHEMA, MeasuredLayers

    passport = load_passport(directory)
    runtime = backend(passport.backend)
    if isinstance(runtime, ProfiledBackend):
        runtime.profile(directory)
        return
    with runtime.load(directory) as engine:
        if not isinstance(engine, LayerTimedEngine) or not passport.profiles:
            raise EngineError(
                f"{directory}: engines of {passport.backend} do not time their layers; leave --measure out"
            )
        batch, sequence = nearest_shape(engine.input_bindings, *passport.profiles[0].optimum)
        times = engine.layer_times(feeds_for(engine, batch, sequence, 1000, 0), rounds)
    measured = MeasuredLayers(passport.engine_sha256, (batch, sequence), rounds, times)
    write_atomic(directory / MEASURED_FILE, encode(measured, MEASURED_SCHEMA))


def profiles_kernels(directory: Path) -> bool:
    """Whether the backend of an engine directory profiles kernels itself."""
    from engines.base import backend
    from engines.passport import load_passport

    return backend(load_passport(directory).backend).CAPABILITIES.profiled_kernels


def is_unprofiled(directory: Path) -> bool:
    """Whether the backend of an engine directory profiles kernels itself, and has not done so for this engine."""
    from engines.base import ProfiledFacts, backend
    from engines.passport import load_passport

    if not profiles_kernels(directory):
        return False
    facts = backend(load_passport(directory).backend).inspect(directory)
    return isinstance(facts, ProfiledFacts) and facts.profiled is None
