"""The engine's passport: what made it and where it may run, checked before anything is deserialized.

It vouches for integrity (this is the file that was built, from that graph, by those versions), not for authenticity:
whoever can replace the engine can replace its passport. It never changes after the build; results of comparing or timing
an engine are files beside it that name its hash.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engines.base import Binding, Profile
from nxm_export.contract.plan import COUNTINGS, CompressionPlan
from nxm_export.errors import ArtifactError
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import read_json, require_schema
from nxm_export.storage.versions import installed_versions

SCHEMA = "nxm-passport/1"
PASSPORT_FILE = "passport.json"


@dataclass(frozen=True)
class EnginePassport:
    """See the module text. `requires` are facts of the machine that must be equal where the engine is loaded; `bindings`
    hold the engine file's own ``inputs`` and ``outputs`` (see `engines.base.Binding`)."""

    backend: str
    engine: str
    engine_sha256: str
    onnx_sha256: str
    versions: Mapping[str, str]
    device: Mapping[str, str]
    requires: Mapping[str, str]
    profiles: Sequence[Mapping[str, Any]]
    graph: Mapping[str, str]
    plan: Mapping[str, Any]
    options: Mapping[str, Any]
    command: Sequence[str]
    created: str
    bindings: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @classmethod
    def issue(
        cls,
        backend: str,
        engine: Path,
        onnx: Path,
        *,
        device: Mapping[str, str],
        requires: Mapping[str, str],
        options: Mapping[str, Any],
        profiles: Sequence[Mapping[str, Any]] = (),
        graph: Mapping[str, str] | None = None,
        bindings: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> EnginePassport:
        """Make the passport of a freshly built engine file and write it beside the engine.

        `graph` is the metadata of the ONNX file: what the exporter put there (dtype, placement, task, plan) is kept.
        """
        facts = {key.removeprefix("nxm."): value for key, value in (graph or {}).items() if key.startswith("nxm.")}
        text = facts.pop("plan", None)
        passport = cls(
            backend,
            engine.name,
            file_hash(engine),
            file_hash(onnx),
            installed_versions(),
            dict(device),
            dict(requires),
            list(profiles),
            facts,
            plan_summary(CompressionPlan.from_json(text, source=str(onnx)) if text else None),
            dict(options),
            [Path(sys.argv[0]).name, *sys.argv[1:]],
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            dict(bindings or {}),
        )
        passport.save(engine.parent)
        return passport

    def save(self, directory: Path) -> None:
        """Write ``passport.json``."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)
        (directory / PASSPORT_FILE).write_text(text + "\n", encoding="utf-8")

    def require_here(self, directory: Path, facts: Mapping[str, str]) -> None:
        """Raise `ArtifactError` unless the engine file is the one that was built and this machine is one it may run on.

        `facts` are this machine's values of `requires`; both sides are named, and the command that rebuilds.
        """
        file = directory / self.engine
        if not file.is_file():
            raise ArtifactError(f"{file} is missing: the passport beside it names it")
        found = file_hash(file)
        if found != self.engine_sha256:
            raise ArtifactError(
                f"{file} is not the engine of its passport (sha256 {found[:12]}..., built as {self.engine_sha256[:12]}...); build it again"
            )
        wrong = [key for key, value in self.requires.items() if facts.get(key) != value]
        if wrong:
            built = ", ".join(f"{key} {self.requires[key]}" for key in wrong)
            here = ", ".join(f"{key} {facts.get(key, 'none')}" for key in wrong)
            raise ArtifactError(
                f"{file} was built for {built}, and this machine has {here}; rebuild it here: {self.rebuild_command()}"
            )

    def read_engine(self, directory: Path, facts: Mapping[str, str]) -> bytes:
        """The engine file's bytes, hashed as they are returned: a file that is swapped after the check cannot be loaded.

        Checks what `require_here` checks, and that no link leads out of the directory. Raises `ArtifactError`.
        """
        file = directory / self.engine
        if directory.resolve() not in file.resolve().parents:
            raise ArtifactError(f"{file} leads out of its directory, to {file.resolve()}; copy the engine itself there")
        self.require_here(directory, facts)
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.engine_sha256:
            raise ArtifactError(f"{file} changed while it was read; load it again when it is written")
        return data

    def shape_profiles(self) -> tuple[Profile, ...]:
        """The shapes that the engine was built for; none means any shape that the model takes."""
        try:
            return tuple(Profile(tuple(p["minimum"]), tuple(p["optimum"]), tuple(p["maximum"])) for p in self.profiles)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the passport's profiles are malformed ({error!r}); build the engine again") from error

    def tensors(self, kind: str) -> tuple[Binding, ...]:
        """The engine file's own ``inputs`` or ``outputs``; raises `ArtifactError` where the passport does not have them."""
        try:
            found = tuple(Binding(b["name"], b["dtype"], tuple(map(int, b["shape"]))) for b in self.bindings[kind])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the passport does not say what the engine's {kind} are; build it again") from error
        if not found:
            raise ArtifactError(f"the passport names no {kind} of the engine; build it again")
        return found

    def rebuild_command(self) -> str:
        """A command that builds this engine again from its graph."""
        parts = ["nxm", "build", "model.onnx", "--backend", self.backend]
        for profile in self.profiles:
            shapes = (profile[key] for key in ("minimum", "optimum", "maximum"))
            parts += ["--profile", ",".join("x".join(map(str, shape)) for shape in shapes)]
        if self.options.get("sparse") is False:
            parts.append("--no-sparse")
        for option, key in (("--level", "level"), ("--workspace", "workspace_bytes"), ("--threads", "threads")):
            if self.options.get(key) is not None:
                parts += [option, str(self.options[key] // 2**20 if key == "workspace_bytes" else self.options[key])]
        if self.options.get("build_route"):
            parts += ["--build-route", f"'{self.options['build_route']}'"]
        return " ".join([*parts, "--out", "ENGINE_DIR"])


def load_passport(directory: str | Path) -> EnginePassport:
    """Read the passport of an engine directory; raises `ArtifactError` when there is none or it is of another schema."""
    file = Path(directory) / PASSPORT_FILE
    if not file.is_file():
        raise ArtifactError(
            f"{directory} has no {PASSPORT_FILE}: it is not an engine directory; make one with `nxm build`"
        )
    data = read_json(file, "build the engine again")
    require_schema(data, SCHEMA, str(file), ArtifactError)
    try:
        passport = EnginePassport(**{key: value for key, value in data.items() if key != "schema"})
    except TypeError as error:
        raise ArtifactError(f"{file}: malformed passport ({error}); build the engine again") from error
    texts = (passport.backend, passport.engine, passport.engine_sha256)
    maps = (passport.requires, passport.graph, passport.plan, passport.options, passport.bindings)
    if not all(isinstance(text, str) and text for text in texts) or not all(isinstance(m, dict) for m in maps):
        raise ArtifactError(f"{file}: malformed passport (a field has another type); build the engine again")
    if passport.engine != Path(passport.engine).name:
        raise ArtifactError(f"{file}: names an engine outside its directory ({passport.engine!r}); do not use it")
    return passport


def plan_summary(plan: CompressionPlan | None) -> dict[str, Any]:
    """The plan in a few numbers: options with their counts, and compression by every counting."""
    if plan is None:
        return {}
    return {
        "options": plan.pattern_counts,
        "attention": plan.attention,
        **({"embedding": plan.embedding} if plan.embedding != "float" else {}),
        "compression": {c: round(plan.compression(c), 4) for c in COUNTINGS},
    }


def cpu_device() -> dict[str, str]:
    """Name and instruction sets of this CPU, as far as Linux says."""
    device = {"kind": "cpu", "machine": platform.machine(), "system": platform.platform()}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return device
    lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = set(lines.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
    return device | {
        "name": lines.get("model name", "unknown"),
        "features": " ".join(flag for flag in wanted if flag in flags),
    }
