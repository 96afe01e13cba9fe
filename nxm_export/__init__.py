"""nxm-export: compress BERT-family encoders to N:M sparsity and low-bit integers, export, build, prove and serve them.

::

    import nxm_export as nxm

    model = nxm.load("my-model", task="classification")
    small = model.compress("train.csv", dev="dev.csv", pattern="2:4", weight_bits=8, out="small")
    engine = small.export("graph").build("engine", backend="auto")
    engine.compare("dev.csv").require()
    engine.predict(["a wonderful film"])      # such as [Prediction(label='positive', score=0.98)]

The same stages are functions on paths: `compress`, `export`, `verify`, `build`, `compare`, ... What `__all__` lists is
public: it changes in a release with a new second number alone, and the changelog says so. Everything else, submodules
of this package, `compressors` and `engines` among them, may change at any time. Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from compressors.search.settings import SearchSettings
    from compressors.settings import Losses, Settings
    from engines.base import BuildOptions, Profile
    from engines.benchmark.latency import BenchReport
    from engines.benchmark.text_throughput import TextReport
    from engines.parity.reports import Comparison, ParityReport
    from engines.passport import EnginePassport
    from engines.predictor import Predictor
    from engines.serving.settings import ConnectionLimits, ModelOptions, RequestLimits, ServerOptions, TritonOptions
    from engines.triton import TritonManifest
    from nxm_export.api.engine_functions import bench, bench_text, build, compare, latency, predict, serve, triton
    from nxm_export.api.functions import (
        card,
        compress,
        diagnose,
        doctor,
        estimate,
        export,
        finetune,
        inspect,
        pack,
        report,
        run,
        search,
        show,
        unpack,
        verify,
    )
    from nxm_export.api.objects import CompressedModel, EngineDirectory, Graph, Model, load, open_engine
    from nxm_export.api.requests import Default, PlanOptions
    from nxm_export.contract.packed_checkpoint import PackedSizes
    from nxm_export.contract.plan import CompressionPlan, NMPattern, WeightSpec
    from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics, DenseMetrics
    from nxm_export.contract.records.latency_table import LatencySource, LatencyTable
    from nxm_export.contract.records.matrix_facts import ProductCounts
    from nxm_export.contract.records.run_summary import RunSummary
    from nxm_export.contract.records.search_result import SearchResult
    from nxm_export.contract.records.verify_report import VerifyReport
    from nxm_export.data.columns import Columns
    from nxm_export.data.more_text import MoreText
    from nxm_export.data.predictions import (
        Answer,
        AnyPrediction,
        Embedding,
        Entity,
        LabelSet,
        Prediction,
        Score,
        TaggedText,
    )
    from nxm_export.data.texts import Text
    from nxm_export.errors import (
        ArtifactError,
        DataError,
        EngineError,
        EngineUnavailable,
        ExportError,
        NxmError,
        ParityError,
        PlanError,
        ServeError,
    )
    from nxm_export.graph.exporter import Exported
    from nxm_export.pipeline.environment import MachineReport
    from nxm_export.pipeline.estimate import RunEstimate
    from nxm_export.pipeline.file_diagnosis import FileDiagnosis
    from nxm_export.pipeline.inspection import CheckpointFacts, EngineInspection, GraphFacts, RunInspection
    from nxm_export.progress import Progress

# Public name -> the module that has it. Tests hold it against the imports above.
_HOMES = {
    **dict.fromkeys(
        ("load", "open_engine", "Model", "CompressedModel", "Graph", "EngineDirectory"), "nxm_export.api.objects"
    ),
    **dict.fromkeys(
        (
            *("run", "estimate", "finetune", "compress", "search", "export", "verify", "pack", "unpack"),
            *("inspect", "doctor", "diagnose", "show", "report", "card"),
        ),
        "nxm_export.api.functions",
    ),
    **dict.fromkeys(
        ("build", "compare", "predict", "bench", "bench_text", "latency", "serve", "triton"),
        "nxm_export.api.engine_functions",
    ),
    **dict.fromkeys(("PlanOptions", "Default"), "nxm_export.api.requests"),
    **dict.fromkeys(("CompressionPlan", "NMPattern", "WeightSpec"), "nxm_export.contract.plan"),
    **dict.fromkeys(("CompressionMetrics", "DenseMetrics"), "nxm_export.contract.records.checkpoint_metrics"),
    **dict.fromkeys(
        ("Prediction", "LabelSet", "Score", "Entity", "TaggedText", "Answer", "Embedding", "AnyPrediction"),
        "nxm_export.data.predictions",
    ),
    **dict.fromkeys(
        (
            *("NxmError", "PlanError", "DataError", "ArtifactError", "ExportError", "EngineError"),
            *("EngineUnavailable", "ParityError", "ServeError"),
        ),
        "nxm_export.errors",
    ),
    "Predictor": "engines.predictor",
    **dict.fromkeys(
        ("ModelOptions", "ServerOptions", "RequestLimits", "ConnectionLimits", "TritonOptions"),
        "engines.serving.settings",
    ),
    "TritonManifest": "engines.triton",
    "PackedSizes": "nxm_export.contract.packed_checkpoint",
    "VerifyReport": "nxm_export.contract.records.verify_report",
    "ProductCounts": "nxm_export.contract.records.matrix_facts",
    "Text": "nxm_export.data.texts",
    "Exported": "nxm_export.graph.exporter",
    "MachineReport": "nxm_export.pipeline.environment",
    "RunEstimate": "nxm_export.pipeline.estimate",
    **dict.fromkeys(
        ("CheckpointFacts", "EngineInspection", "GraphFacts", "RunInspection"), "nxm_export.pipeline.inspection"
    ),
    "FileDiagnosis": "nxm_export.pipeline.file_diagnosis",
    "Progress": "nxm_export.progress",
    "Columns": "nxm_export.data.columns",
    "MoreText": "nxm_export.data.more_text",
    **dict.fromkeys(("Settings", "Losses"), "compressors.settings"),
    "SearchSettings": "compressors.search.settings",
    "SearchResult": "nxm_export.contract.records.search_result",
    "RunSummary": "nxm_export.contract.records.run_summary",
    **dict.fromkeys(("LatencySource", "LatencyTable"), "nxm_export.contract.records.latency_table"),
    "BuildOptions": "engines.base",
    "Profile": "engines.base",
    "EnginePassport": "engines.passport",
    "Comparison": "engines.parity.reports",
    "ParityReport": "engines.parity.reports",
    "BenchReport": "engines.benchmark.latency",
    "TextReport": "engines.benchmark.text_throughput",
}

__all__ = [  # noqa: RUF022  (in the order in which one meets them)
    "load",
    "open_engine",
    "Model",
    "CompressedModel",
    "Graph",
    "EngineDirectory",
    "run",
    "finetune",
    "compress",
    "search",
    "export",
    "verify",
    "build",
    "compare",
    "bench",
    "bench_text",
    "latency",
    "predict",
    "pack",
    "unpack",
    "inspect",
    "doctor",
    "diagnose",
    "estimate",
    "show",
    "report",
    "card",
    "serve",
    "triton",
    "PlanOptions",
    "Default",
    "Settings",
    "Losses",
    "SearchSettings",
    "LatencyTable",
    "LatencySource",
    "BuildOptions",
    "Profile",
    "ModelOptions",
    "ServerOptions",
    "RequestLimits",
    "ConnectionLimits",
    "TritonOptions",
    "Columns",
    "MoreText",
    "Progress",
    "WeightSpec",
    "NMPattern",
    "CompressionPlan",
    "RunSummary",
    "RunEstimate",
    "CompressionMetrics",
    "DenseMetrics",
    "SearchResult",
    "Exported",
    "VerifyReport",
    "ProductCounts",
    "PackedSizes",
    "GraphFacts",
    "EngineInspection",
    "CheckpointFacts",
    "RunInspection",
    "FileDiagnosis",
    "MachineReport",
    "TritonManifest",
    "EnginePassport",
    "Comparison",
    "ParityReport",
    "BenchReport",
    "TextReport",
    "Predictor",
    "Text",
    "AnyPrediction",
    "Prediction",
    "LabelSet",
    "Score",
    "Entity",
    "TaggedText",
    "Answer",
    "Embedding",
    "NxmError",
    "PlanError",
    "DataError",
    "ArtifactError",
    "ExportError",
    "EngineError",
    "EngineUnavailable",
    "ParityError",
    "ServeError",
    "__version__",
]


if not TYPE_CHECKING:  # a type checker knows the imports above, and takes any other name for the error that it is

    def __getattr__(name: str) -> object:
        """A public name, from the module that has it."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from nxm_export.own_packages import require_own_packages

        require_own_packages()  # a folder of the user's named `engines` or `compressors` is said to be in the way
        value: object = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value  # asked for once
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
