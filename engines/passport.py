"""The engine's passport: what made it and where it may run, checked before anything is deserialized.

It covers the engine file and what is served beside it: ``spec.json`` with the labels, and the tokenizer. A passport of
before that covers the engine alone, and whoever reads it says so. It also has the hashes of what the build wrote as
evidence of which kernels run. It vouches for integrity (these are the files that were built, from that graph, by those
versions), not for authenticity: whoever can replace the engine can replace its passport. It never changes after the
build; results of comparing or timing an engine are files beside it that name its hash.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from engines.base import COMPANIONS, Binding, Profile
from engines.passport_options import known_options, require_options
from nxm_export.contract.choices import SPARSE_USE
from nxm_export.contract.io_spec import SPEC_FILE, TOKENIZER_FILE, IOSpec, load_spec, parse_spec
from nxm_export.contract.plan import COUNTINGS, CompressionPlan
from nxm_export.data.tokenization import load_tokenizer, parse_tokenizer
from nxm_export.errors import ArtifactError, EngineError, notice
from nxm_export.storage.hashing import HashedFiles, file_hash, joint_hash
from nxm_export.storage.json_files import as_object, encode, read_record, to_json_object
from nxm_export.storage.unreadable import unreadable
from nxm_export.storage.versions import installed_versions

if TYPE_CHECKING:
    from nxm_export.data.tokenization import Tokenizer

T = TypeVar("T")

SCHEMA = "nxm-passport/2"
_LONGEST_NAME = 255  # bytes of a file's name, on the file systems of Linux
PASSPORT_FILE = "passport.json"


@dataclass(frozen=True)
class PlanSummary:
    """A plan in a few numbers: options with their counts as ``{"2:4+W8": 36}``, and compression by every counting."""

    options: Mapping[str, int]
    attention: str
    embedding: str
    compression: Mapping[str, float]

    @classmethod
    def of(cls, plan: CompressionPlan) -> PlanSummary:
        """The summary of `plan`."""
        compression = {counting: round(plan.compression(counting), 4) for counting in COUNTINGS}
        return cls(plan.pattern_counts, plan.attention, plan.embedding, compression)


@dataclass(frozen=True)
class Bindings:
    """The engine file's own inputs and outputs."""

    inputs: tuple[Binding, ...] = ()
    outputs: tuple[Binding, ...] = ()


@dataclass(frozen=True)
class BuildFacts:
    """What a build records about its engine.

    `requires` are facts of the machine that must be equal where the engine is loaded; `options` are what the build was
    told and what it did, by names of each backend's own; `graph` is the metadata of the ONNX file, and `source` that
    file with all that hold its weights, as they were when the build read them. `evidence` are the names of the files
    beside the engine that say which kernels run.
    """

    device: Mapping[str, str]
    requires: Mapping[str, str]
    options: Mapping[str, object]
    graph: Mapping[str, str]
    source: HashedFiles
    bindings: Bindings
    profiles: tuple[Profile, ...] = ()
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class EnginePassport:
    """See the module text and `BuildFacts`. `graph` is what the exporter wrote into the ONNX file, without the plan;
    `plan` is None for a model without one; no `profiles` mean that the engine takes any shape that the model takes.
    `onnx_sha256` is that of the ONNX file, or of one whose weights lie beside it the `joint_hash` of all its files.
    `companions` has the sha256 of each of `COMPANIONS` that was there; None in a passport that covers the engine alone.
    `evidence` has that of each file that says which kernels run, by name; None in a passport of before that.
    """

    backend: str
    engine: str
    engine_sha256: str
    onnx_sha256: str
    versions: Mapping[str, str]
    device: Mapping[str, str]
    requires: Mapping[str, str]
    profiles: tuple[Profile, ...]
    graph: Mapping[str, str]
    plan: PlanSummary | None
    options: Mapping[str, object]
    command: tuple[str, ...]
    created: str
    bindings: Bindings = Bindings()
    companions: Mapping[str, str] | None = None
    evidence: Mapping[str, str] | None = None

    @classmethod
    def issue(cls, backend: str, engine: Path, onnx: Path, facts: BuildFacts) -> EnginePassport:
        """Make the passport of a freshly built engine file and write it beside the engine.

        What the exporter put into the graph's metadata (dtype, placement, task, plan) is kept. Raises `ArtifactError`
        when the graph or its weights changed during the build.
        """
        facts.source.require_unchanged()
        exported = _current_names(
            {key.removeprefix("nxm."): text for key, text in facts.graph.items() if key.startswith("nxm.")}
        )
        plan = exported.pop("plan", None)
        passport = cls(
            backend=backend,
            engine=engine.name,
            engine_sha256=file_hash(engine),
            onnx_sha256=facts.source.sha256,
            versions=installed_versions(),
            device=dict(facts.device),
            requires=dict(facts.requires),
            profiles=facts.profiles,
            graph=exported,
            plan=PlanSummary.of(CompressionPlan.from_json(plan, source=str(onnx))) if plan else None,
            options=dict(facts.options),
            command=(Path(sys.argv[0]).name, *sys.argv[1:]),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            bindings=facts.bindings,
            companions=companion_hashes(engine.parent),
            evidence={name: file_hash(engine.parent / name) for name in facts.evidence},
        )
        passport.save(engine.parent)
        return passport

    @property
    def contents_sha256(self) -> str | None:
        """One hash of all that is served: of what ``sha256sum`` prints for the engine file and its companions, by name.
        None where the passport covers the engine alone."""
        if self.companions is None:
            return None
        return joint_hash({**self.companions, self.engine: self.engine_sha256})

    @property
    def covers(self) -> str:
        """What the passport vouches for, in words."""
        if self.companions is None:
            return "the engine alone"
        return f"the engine and {' and '.join(sorted(self.companions)) or 'nothing beside it'}"

    def notice_coverage(self, directory: Path) -> None:
        """Say so where nothing vouches for the labels and the tokenizer."""
        if self.companions is None:
            notice(
                f"{directory}: its passport covers {self.covers}, so nothing says that {SPEC_FILE} and "
                f"{TOKENIZER_FILE} are those it was built with; build it again"
            )

    @property
    def threads(self) -> int | None:
        """The CPU threads that the engine was built with; None: all cores of the process."""
        return self.whole_option("threads")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The shapes (batch, sequence) that the engine keeps compiled, beside the model that takes any."""
        return known_options({"shapes": self.options.get("shapes", ())}, PASSPORT_FILE).shapes

    @property
    def twin(self) -> str | None:
        """The engine's part in a comparison of twins (see `nxm build --twins`)."""
        return self.text_option("twin")

    @property
    def sparse(self) -> Literal["auto", "always", "never"]:
        """Where sparse kernels were allowed; older passports have true or false."""
        given = known_options({"sparse": self.options.get("sparse")}, PASSPORT_FILE).sparse
        return given if isinstance(given, str) else "never" if given is False else SPARSE_USE

    @property
    def built_on(self) -> str:
        """The GPU or CPU that it was built on, in words."""
        capabilities = self.device.get(
            "compute_capabilities"
        )  # of an engine that chooses its kernels where it is loaded
        elsewhere = f"no GPU, for compute capability {capabilities}" if capabilities else None
        return (
            self.device.get("gpu")
            or self.device.get("name")
            or elsewhere
            or self.device.get("kind")
            or "an unknown device"
        )

    def whole_option(self, name: str) -> int | None:
        """An option that is a whole number, or None where it was not recorded; raises `ArtifactError` for another."""
        value = self.options.get(name)
        if value is not None and type(value) is not int:
            raise ArtifactError(
                f"{PASSPORT_FILE}: options.{name} must be a whole number, got {value!r}; build the engine again"
            )
        return value

    def text_option(self, name: str) -> str | None:
        """An option that is a text, or None where it was not recorded; raises `ArtifactError` for another."""
        value = self.options.get(name)
        if value is not None and not isinstance(value, str):
            raise ArtifactError(
                f"{PASSPORT_FILE}: options.{name} must be a text, got {value!r}; build the engine again"
            )
        return value

    def to_dict(self) -> dict[str, object]:
        """JSON form, without the schema."""
        return to_json_object(self)

    def save(self, directory: Path) -> None:
        """Write ``passport.json``."""
        (directory / PASSPORT_FILE).write_text(encode(self, SCHEMA), encoding="utf-8")

    def require_here(self, directory: Path, facts: Mapping[str, str]) -> None:
        """Raise `ArtifactError` unless the engine file is the one that was built and this machine is one it may run on.

        `facts` are this machine's values of `requires`; both sides are named, and the command that rebuilds.
        """
        self.require_whole(directory)
        file = directory / self.engine
        wrong = [key for key, value in self.requires.items() if facts.get(key) != value]
        if wrong:
            built = ", ".join(f"{key} {self.requires[key]}" for key in wrong)
            here = ", ".join(f"{key} {facts.get(key, 'none')}" for key in wrong)
            raise ArtifactError(
                f"{file} was built for {built}, and this machine has {here}; rebuild it here: {self.rebuild_command()}"
            )

    def require_whole(self, directory: Path) -> None:
        """Raise `ArtifactError` unless engine file and companions are those that were built, whatever machine this
        is."""
        file = self.require_engine(directory)
        actual = file_hash(file)
        if actual != self.engine_sha256:
            raise ArtifactError(
                f"{file} is not the engine of its passport (sha256 {actual[:12]}..., built as "
                f"{self.engine_sha256[:12]}...); build it again"
            )
        self.require_companions(directory)

    def require_engine(self, directory: Path) -> Path:
        """The engine file; raises `ArtifactError` where there is none."""
        file = directory / self.engine
        if not file.is_file():
            raise ArtifactError(f"{file} is missing: the passport beside it names it; restore it, or build again")
        return file

    def require_companions(self, directory: Path) -> None:
        """Raise `ArtifactError` unless the companions in `directory` are those that the engine was built with; of a
        passport that covers the engine alone, any are."""
        for name in COMPANIONS if self.companions is not None else ():
            self._require_companion(name, companion_hash(directory / name), directory / name)

    def read_companion(self, directory: Path, name: str) -> str | None:
        """The text of one of `COMPANIONS`, hashed as it is read; None where the engine has none.

        Raises `ArtifactError` for one that is not as the passport has it, or that is no text.
        """
        file = directory / name
        if name not in (self.companions or ()) and not file.exists():
            return None
        data = _bytes_of(file)
        if self.companions is not None:
            self._require_companion(name, None if data is None else hashlib.sha256(data).hexdigest(), file)
        try:
            return None if data is None else data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{file}: not a JSON file (it is not UTF-8 text); build the engine again") from error

    def read_evidence(self, directory: Path, name: str) -> str | None:
        """The text of a file that says which kernels run, hashed as it is read; None where there is none. What is no
        UTF-8 in it (a builder prints what it likes) is replaced.

        Raises `ArtifactError` for one that is not as the passport has it; a passport without such hashes ties none to
        its engine (see `untied`), and any is read.
        """
        file = directory / name
        data = _bytes_of(file)
        if data is None:
            return None
        if self.evidence is not None:
            built, actual = self.evidence.get(name), hashlib.sha256(data).hexdigest()
            if built is None:
                raise ArtifactError(
                    f"{file} is none of what the build of this engine wrote, so it proves nothing of it; remove it"
                )
            if actual != built:
                raise ArtifactError(
                    f"{file} is not the one that the build of this engine wrote (sha256 {actual[:12]}..., written as "
                    f"{built[:12]}...); restore it, or build the engine again"
                )
        return data.decode("utf-8", errors="replace")

    def untied(self, directory: Path, *names: str) -> str | None:
        """Why nothing ties evidence to this engine: its passport has no hashes, or one of the files `names` that it has
        them of is gone. None where all is as it was built."""
        if self.evidence is None:
            return (
                "its passport is of before passports had the hashes of evidence, so nothing says that what lies beside "
                "the engine is of its build; build it again"
            )
        gone = [name for name in names if name in self.evidence and not (directory / name).is_file()]
        return (
            f"{gone[0]} is missing, and the passport names it; restore it, or build the engine again" if gone else None
        )

    def _require_companion(self, name: str, actual: str | None, file: Path) -> None:
        built = (self.companions or {}).get(name)
        if actual == built:
            return
        if built is None:
            raise ArtifactError(
                f"{file} was not there when the engine was built, so nothing says that it belongs to it; put it beside "
                "the graph and build the engine again"
            )
        if actual is None:
            raise ArtifactError(f"{file} is missing: the passport beside it names it; restore it, or build again")
        raise ArtifactError(
            f"{file} is not the one that the engine was built with (sha256 {actual[:12]}..., built with "
            f"{built[:12]}...); restore it, or build the engine again"
        )

    def read_engine(self, directory: Path, facts: Mapping[str, str]) -> bytes:
        """The engine file's bytes, hashed as they are returned: one that is swapped after the check cannot be loaded.

        Checks what `require_here` checks, and that no link leads out of the directory. Raises `ArtifactError`.
        """
        file = directory / self.engine
        if directory.resolve() not in file.resolve().parents:
            raise ArtifactError(f"{file} leads out of its directory, to {file.resolve()}; copy the engine itself there")
        self.require_here(directory, facts)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ArtifactError(unreadable(file, error)) from error
        if hashlib.sha256(data).hexdigest() != self.engine_sha256:
            raise ArtifactError(f"{file} changed while it was read; load it again when it is written")
        return data

    def tensors(self, kind: Literal["inputs", "outputs"]) -> tuple[Binding, ...]:
        """The engine file's own inputs or outputs; raises `ArtifactError` where the passport does not have them."""
        bindings = self.bindings.inputs if kind == "inputs" else self.bindings.outputs
        if not bindings:
            raise ArtifactError(f"the passport does not say what the engine's {kind} are; build it again")
        return bindings

    def rebuild_command(self) -> str:
        """A command that builds this engine again from its graph."""
        parts = ["nxm", "build", "model.onnx", "--backend", self.backend]
        for profile in self.profiles:
            shapes = (profile.minimum, profile.optimum, profile.maximum)
            parts += ["--profile", ",".join("x".join(map(str, shape)) for shape in shapes)]
        for batch, sequence in self.shapes:
            parts += ["--shape", f"{batch}x{sequence}"]
        if self.sparse != SPARSE_USE:
            parts += ["--sparse", self.sparse]
        if self.options.get("fuse") is False:
            parts.append("--no-fuse")
        workspace, route = self.whole_option("workspace_bytes"), self.text_option("build_route")
        numbers = {
            "--level": self.whole_option("level"),
            "--workspace": None if workspace is None else workspace // 2**20,
            "--threads": self.threads,
        }
        for option, number in numbers.items():
            if number is not None:
                parts += [option, str(number)]
        if route:
            parts += ["--build-route", f"'{route}'"]
        return " ".join([*parts, "--out", "ENGINE_DIR"])


def covered_spec(directory: Path, passport: EnginePassport) -> IOSpec:
    """``spec.json`` beside an engine, hashed as it is read; raises `ArtifactError`."""
    text = passport.read_companion(directory, SPEC_FILE)
    return load_spec(directory) if text is None else parse_spec(text, directory / SPEC_FILE)


def covered_tokenizer(directory: Path, passport: EnginePassport) -> Tokenizer:
    """The tokenizer beside an engine, hashed as it is read; raises `ArtifactError`."""
    text = passport.read_companion(directory, TOKENIZER_FILE)
    return load_tokenizer(directory) if text is None else parse_tokenizer(text, directory / TOKENIZER_FILE)


def _bytes_of(file: Path) -> bytes | None:
    """The bytes of a file beside an engine, None where there is none; `ArtifactError` when it cannot be read."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(unreadable(file, error)) from error


def companion_hash(file: Path) -> str | None:
    """sha256 of a file beside an engine, None where it is not there; raises `ArtifactError` when it cannot be read."""
    return file_hash(file) if file.exists() else None


def companion_hashes(directory: Path) -> dict[str, str]:
    """The sha256 of every companion that lies in an engine directory, by name."""
    hashes = {name: companion_hash(directory / name) for name in COMPANIONS}
    return {name: digest for name, digest in hashes.items() if digest is not None}


def load_passport(directory: str | Path) -> EnginePassport:
    """Read the passport of an engine directory; raises `ArtifactError` when there is none, or a damaged one."""
    file = Path(directory) / PASSPORT_FILE
    try:
        there = file.is_file()
    except OSError as error:  # of a directory that may not be read, or that is away with its machine
        raise ArtifactError(unreadable(file, error)) from error
    if not there:
        raise ArtifactError(
            f"{directory} has no {PASSPORT_FILE}: it is not an engine directory; make one with `nxm build`"
        )
    try:
        passport = read_record(
            file,
            EnginePassport,
            schema=SCHEMA,
            way_out="build the engine again",
            older={"nxm-passport/1": _of_first_schema},
        )
    except EngineError as error:
        raise ArtifactError(f"{file}: {error}; build the engine again") from error
    if not _is_file_name(passport.engine):
        raise ArtifactError(
            f"{file}: names an engine outside its directory, or by what is no file's name ({passport.engine!r:.80}); "
            "do not use it"
        )
    require_options(passport.options, str(file))
    return passport


def _is_file_name(name: str) -> bool:
    """Whether `name` can be that of a file in a directory: asking for any other raises, or asks for something else."""
    plain = name not in ("", "..") and name == Path(name).name
    return plain and "\0" not in name and len(name.encode("utf-8")) <= _LONGEST_NAME


def _of_first_schema(fields: dict[str, object]) -> dict[str, object]:
    """Schema 1 wrote an empty plan for none and left the embedding out where it was float."""
    plan = {"embedding": "float", **as_object(fields["plan"])} if fields["plan"] else None
    return {**fields, "plan": plan, "graph": _current_names(as_object(fields["graph"]))}


def _current_names(graph: Mapping[str, T]) -> dict[str, T]:
    """The facts of a graph under today's names, from those of nxm-onnx/1."""
    renamed = {"islands": "precision_overrides", "table": "embedding_sha256"}
    return {renamed.get(key, key): text for key, text in graph.items()}
