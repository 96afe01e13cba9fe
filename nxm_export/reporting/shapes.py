"""What the JSON files of a run must look like, as far as a report reads them, so that a damaged one is said to be damaged."""

from __future__ import annotations

from typing import Any

NUMBER = (int, float)
NAN = (int, float, type(None))  # JSON has no NaN; files hold null
TEXT = (str, type(None))
_RATIOS = [{"name": str, "reference": str, "batch": int, "sequence": int, "speedup": NAN, "interval": [NAN]}]
_METRICS = {"?metric": str, "?value": NAN, "?interval": [NAN], "?dev_samples": int}

# file name -> shape: a type or several, [shape of every item], {field: shape} where "?field" may be absent, {...: shape of
# every value}. Fields that are not named may be anything.
SHAPES: dict[str, Any] = {
    "summary.json": {
        "metric": str,
        "dev_samples": int,
        "dense": NAN,
        "compressed": NAN,
        "checkpoint": NAN,
        "difference_interval": [NAN],
        "compression": {...: NUMBER},
        "plan": {...: int},
        "parity": {...: {"agreement": NAN, "max_abs": NAN, "passed": bool, "value": NAN}},
        "latency_ms": {...: {"batch": int, "seq": int, "median": NAN}},
        "speedup": _RATIOS,
        "onnx_bytes": {...: int},
        "missing": {...: str},
        "failed": {...: str},
        "training": dict,
    },
    "metrics.json": _METRICS,
    "latency.json": {
        "timings": [{"name": str, "batch": int, "sequence": int, "median": NUMBER, "quartiles": [NUMBER]}],
        "ratios": _RATIOS,
        "?verdict": TEXT,
        "?unmeasured": [str],
    },
    "parity.json": {
        "passed": bool,
        "engine_sha256": str,
        "?samples": int,
        "?metric": TEXT,
        "?engine_value": NAN,
        "?engine_interval": [NAN],
        "outputs": [{"output": str, "?max_abs": NAN, "?mean_abs": NAN, "?max_tolerance": NAN, "?mean_tolerance": NAN}],
        "?pairs": [{"other": str, "output": str, "?max_abs": NAN, "?mean_abs": NAN, "?difference_interval": [NAN]}],
        "?secondary_metrics": {...: [NAN]},
    },
    "bisect.json": {
        "engine_sha256": str,
        "blocks": [{"block": str, "?accumulated_max_abs": NAN, "?isolated_max_abs": NAN}],
    },
    "verify.json": {"weights": [{"name": str, "?planned": TEXT, "?pattern": TEXT, "?problems": [str]}]},
    "passport.json": {
        "backend": str,
        "engine": str,
        "engine_sha256": str,
        "versions": dict,
        "device": dict,
        "requires": dict,
        "graph": dict,
        "plan": (dict, type(None)),
        "options": dict,
    },
    "spec.json": {"task": str, "labels": [str], "inputs": [str]},
    "search.json": {"?best": dict, "?pareto": [dict]},
}
_LENGTHS = {"interval": 2, "quartiles": 2, "difference_interval": 2, "engine_interval": 2}


def misfit(value: Any, shape: Any, where: str = "") -> str | None:
    """The first place in `value` that is not of `shape`, None where all is."""
    if isinstance(shape, list):
        if not isinstance(value, list) or len(value) != _LENGTHS.get(where.rpartition("/")[2], len(value)):
            return where or "all of it"
        return next(filter(None, (misfit(item, shape[0], f"{where}/{i}") for i, item in enumerate(value))), None)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return where or "all of it"
        if ... in shape:
            return next(filter(None, (misfit(item, shape[...], f"{where}/{key}") for key, item in value.items())), None)
        for field, inner in shape.items():
            name = field.removeprefix("?")
            if name not in value and not field.startswith("?"):
                return f"{where}/{name}"
            if name in value and (found := misfit(value[name], inner, f"{where}/{name}")):
                return found
        return None
    kinds = shape if isinstance(shape, tuple) else (shape,)
    fits = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
    return None if fits else where or "all of it"
