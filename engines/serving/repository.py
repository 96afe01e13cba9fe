"""The models of a server by name and version, and their reload.

Names are looked up in a dict; no part of a request ever becomes a path. A changed engine directory is loaded beside the
old engine, checked and warmed up like at the start, and takes its place between two requests; the old engine answers
what it has and goes. A directory that is refused leaves the old engine serving, whose files were verified when they
were read, and is tried again when anything in it changes, such as the parity report that it lacked, and a while later
where there was no room to load it: no file could be opened, or memory ran out. A report that comes
for the engine that serves decides whether it goes on, as ``--parity`` has it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.admission import admitted, require_gate
from engines.base import COMPANIONS
from engines.parity.bisect_reports import BISECT_FILE
from engines.parity.reports import PARITY_FILE
from engines.passport import PASSPORT_FILE, covered_spec, load_passport
from engines.serving.model import TEXT_SUFFIX, Endpoint, Model, buckets_of, open_model
from engines.serving.settings import ModelOptions
from nxm_export.errors import ArtifactError, NxmError, ParityError, RequestRefused, ServeError
from nxm_export.storage.unreadable import is_without_room

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_TAKEN = "stats"
_VERSION = re.compile(r"[1-9][0-9]{0,17}\Z")
_PUT_OFF = 10.0  # seconds
_File = tuple[int, int, int]  # inode, time of its last change in nanoseconds, bytes


@dataclass(frozen=True)
class Signature:
    """What changes when an engine directory is written again: the files that are served, and what was found when it was
    compared."""

    contents: tuple[_File | None, ...]
    parity: tuple[_File | None, ...]


@dataclass(frozen=True)
class Change:
    """A directory that changed: it is to be loaded again, or, where only the parity report is new, judged again.
    `trouble`: it could not be looked at, and why."""

    key: tuple[str, str]
    reload: bool
    trouble: NxmError | None = None


@dataclass(frozen=True)
class EngineSource:
    """What to serve: an engine directory under a name and a version."""

    name: str
    version: str
    directory: Path

    @classmethod
    def parse(cls, text: str) -> EngineSource:
        """``[NAME[:VERSION]=]DIR``; the name is the directory's and the version 1 where they are left out."""
        label, separator, directory = text.partition("=")
        if not separator:
            label, directory = "", text
        name, colon, version = label.partition(":")
        path = Path(directory)
        source = cls(name or path.resolve().name, version if colon else "1", path)
        if not _NAME.match(source.name):
            raise ServeError(
                f"{source.name!r} cannot be a model's name (letters, digits, . _ -); write "
                f"NAME={directory or 'ENGINE_DIR'}"
            )
        if source.name == _TAKEN:
            raise ServeError(
                f"{source.name!r} cannot be a model's name: /v2/models/{_TAKEN} is the path of all statistics; write "
                f"NAME={directory or 'ENGINE_DIR'}"
            )
        if not _VERSION.match(source.version):
            raise ServeError(
                f"{text}: version {source.version!r} is not a number from 1 as it is written in a path (7, not 07)"
            )
        if not directory:
            raise ServeError(f"{text!r} names no engine directory; write NAME:VERSION=ENGINE_DIR")
        return source


class Repository:
    """All models of a server. Changed on the event loop only, where it is also read."""

    def __init__(self, sources: Sequence[EngineSource], options: ModelOptions) -> None:
        if not sources:
            raise ServeError("nothing to serve: give at least one engine directory")
        self._options = options
        self._models: dict[tuple[str, str], Model] = {}
        self._seen: dict[tuple[str, str], Signature | None] = {}
        self._former: dict[tuple[str, str], Signature | None] = {}  # what `_seen` was before the last change
        self._put_off: dict[tuple[str, str], float] = {}  # until when, on `time.monotonic`
        self._pending: dict[tuple[str, str], Signature | None] = {}
        self._gone: set[tuple[str, str]] = set()  # directories that are not whole, which was said
        self._refused: set[tuple[str, str]] = set()
        self._stopping = False
        self.opened = False  # every model is loaded
        self.retired: list[Model] = []
        self._sources = {(source.name, source.version): source for source in sources}
        if len(self._sources) != len(sources):
            raise ServeError("two engine directories have the same name and version; write NAME:VERSION=ENGINE_DIR")
        self._endpoints: dict[str, dict[str, Endpoint]] = {}

    def require_admitted(self) -> None:
        """Raise for names that collide, and for the first directory that is refused without loading it: see
        `engines.admission.admitted`."""
        self._require_distinct_names()
        for source in self._sources.values():
            passport = admitted(source.directory, self._options.gate, self._options.expect_sha256)
            passport.require_engine(source.directory)
            passport.require_companions(source.directory)
            buckets_of(covered_spec(source.directory, passport), passport, self._options)

    def _require_distinct_names(self) -> None:
        if self._options.text:
            require_distinct_names(list(self._sources.values()), [TEXT_SUFFIX])

    def open(self) -> None:
        """Load all models, unless `stop_opening` comes first; raises what `open_model` raises for the first that is
        refused. Blocks; nothing is found before it is done."""
        self._require_distinct_names()
        try:
            for key, source in self._sources.items():
                if self._stopping:
                    return
                self._seen[key] = signature(source.directory)
                self._put(key, open_model(source.name, source.version, source.directory, self._options))
        except BaseException:
            self.close()
            raise
        self.opened = True

    def stop_opening(self) -> None:
        """Load no more models; the one that is being loaded ends first."""
        self._stopping = True

    @property
    def ready(self) -> bool:
        """True when every model is loaded and answers: none was withdrawn, no thread of one has ended, and no engine
        fails."""
        return self.opened and all(model.is_answering for model in self._models.values())

    @property
    def models(self) -> list[Model]:
        """Every model that serves."""
        return list(self._models.values())

    def find(self, name: str, version: str | None) -> Endpoint:
        """An endpoint by name, of the highest version where none is asked for; raises `RequestRefused` (404, and 503
        while the models are loaded)."""
        if not self.opened:
            raise RequestRefused(503, "the models are being loaded; try again later", retry_after=1, reason="loading")
        versions = self._endpoints.get(name)
        if versions is None:
            raise RequestRefused(404, f"no model is called {name!r:.80}; this server has {', '.join(self._endpoints)}")
        if version is None:
            return versions[max(versions, key=int)]
        if version not in versions:
            raise RequestRefused(404, f"model {name!r} has no version {version!r:.40}; it has {', '.join(versions)}")
        return versions[version]

    def versions(self, name: str) -> list[str]:
        """The versions of an endpoint that exists, rising."""
        return sorted(self._endpoints[name], key=int)

    def index(self) -> list[dict[str, str]]:
        """The repository index of the protocol."""
        if not self.opened:
            return [
                {"name": name, "version": version, "state": "LOADING", "reason": ""} for name, version in self._sources
            ]
        reasons = {model: _why_unready(model) for model in self._models.values()}
        return [
            {
                "name": name,
                "version": version,
                "state": "UNAVAILABLE" if reasons[model] else "READY",
                "reason": reasons[model],
            }
            for name in self._endpoints
            for version in self.versions(name)
            for model in [self._endpoints[name][version].model]
        ]

    def changed(self) -> list[Change]:
        """Directories that changed since they were looked at, and have held still since the last call.

        A directory that is being written, or replaced at this moment, is left for the next call; one that stays away
        is trouble, once.
        """
        changes = []
        for key, source in self._sources.items():
            if time.monotonic() < self._put_off.get(key, 0.0):
                continue
            try:
                seen, now = self._seen[key], signature(source.directory)
            except NxmError as error:
                changes.append(Change(key, reload=False, trouble=error))
                self._put_off[key] = time.monotonic() + _PUT_OFF
                continue
            if now is not None:
                self._gone.discard(key)
            if now == seen:
                self._pending.pop(key, None)
            elif key not in self._pending or self._pending[key] != now:
                self._pending[key] = now
            elif now is not None:
                anew = seen is None or now.contents != seen.contents or key in self._refused
                changes.append(Change(key, anew))
            elif key not in self._gone:
                self._gone.add(key)
                changes.append(Change(key, reload=False, trouble=_not_whole(source.directory)))
        return changes

    def begin_reload(self, key: tuple[str, str]) -> Callable[[], Model]:
        """A function that loads a changed directory (and blocks: call it off the event loop; raises like `open_model`).

        A directory that it refuses is not tried again until anything in it changes again.
        """
        source = self._sources[key]
        self._take_note(key)
        self._refused.add(key)  # until it has taken its place
        return lambda: open_model(source.name, source.version, source.directory, self._options)

    def replace(self, key: tuple[str, str], model: Model) -> None:
        """Let `model` serve from now on; the old one is in `retired` until nobody uses it."""
        self.retired.append(self._models[key])
        self._put(key, model)
        self._refused.discard(key)

    def begin_judging(self, key: tuple[str, str]) -> Callable[[], str | None]:
        """A function that says why the model under a key must not go on, by the reports beside it now (None: it
        may); it blocks, as that of `begin_reload` does, and raises where there is no room to look."""
        self._take_note(key)
        return self.judging(key)

    def put_off(self, key: tuple[str, str]) -> None:
        """Act on the last change of a directory once more, a while later."""
        self._seen[key] = self._former[key]
        self._put_off[key] = time.monotonic() + _PUT_OFF

    def _take_note(self, key: tuple[str, str]) -> None:
        self._former[key], self._seen[key] = self._seen[key], self._pending.pop(key)

    def judging(self, key: tuple[str, str]) -> Callable[[], str | None]:
        """What `begin_judging` gives, after a reload that was refused: what lies there may be the engine that serves,
        with a report that failed."""
        model = self._models[key]
        return lambda: _objection(model, self._options.gate)

    def current(self, key: tuple[str, str]) -> Model:
        """The model that serves under a key."""
        return self._models[key]

    def close(self) -> None:
        """Close every model."""
        for model in (*self._models.values(), *self.retired):
            model.close()

    def _put(self, key: tuple[str, str], model: Model) -> None:
        self._models[key] = model
        for endpoint in model.endpoints:
            others = self._endpoints.setdefault(endpoint.name, {})
            others[model.version] = endpoint


# What clients are told; the log has the objection, with the paths of this machine.
_WITHDRAWN = "withdrawn: its parity with its checkpoint is not what --parity asks for"
_ENDED = "a thread that runs its engine has ended; start the server again"
_FAILING = "its engine fails, also at what it answered when it was loaded; if it stays so, start the server again"


def _why_unready(model: Model) -> str:
    if model.is_answering:
        return ""
    return _WITHDRAWN if model.withdrawn else _ENDED if model.has_ended else _FAILING


def require_distinct_names(sources: Sequence[EngineSource], suffixes: Sequence[str], *, folded: bool = False) -> None:
    """Raise `ServeError` if two models need one name: their own, or with one of `suffixes` that of a part of theirs.

    No version makes that right: whoever asks for the highest one would get this or that. `folded` names become
    directories, and some file systems take A for a.
    """
    owners: dict[str, str] = {}
    for name in sorted({source.name for source in sources}):
        for suffix in ("", *suffixes):
            full = name + suffix
            owner = owners.setdefault(full.lower() if folded else full, name)
            if owner != name:
                raise ServeError(
                    f"{owner} and {name} both need the name {full}, a model's or that of the text frontend of one, or "
                    "of a part of it; rename one of them"
                )


def _not_whole(directory: Path) -> ArtifactError:
    return ArtifactError(
        f"{directory} is gone or not whole ({PASSPORT_FILE}, or the engine that it names, is not there); put an engine "
        "directory there: no server can start from this one"
    )


def _objection(model: Model, gate: str) -> str | None:
    try:
        passport, serving = load_passport(model.directory), model.passport
        if (passport.engine_sha256, passport.contents_sha256) != (serving.engine_sha256, serving.contents_sha256):
            return model.withdrawn  # what lies there is another engine, of which its report speaks
        if passport != serving and not (model.directory / PARITY_FILE).exists():
            return model.withdrawn  # the same one, built again and not yet compared
        require_gate(model.directory, model.passport, gate)
    except ParityError as error:
        return str(error)
    except NxmError as error:
        if is_without_room(error):
            raise
        return model.withdrawn
    return None


def signature(directory: Path) -> Signature | None:
    """What changes when an engine directory is written again; None while it is not whole.

    Raises `ArtifactError` where there is no room to look.
    """
    try:
        engine = load_passport(directory).engine
    except NxmError as error:
        if is_without_room(error):
            raise
        engine = PASSPORT_FILE  # one that cannot be read is refused when it is loaded, and the log says why
    served = [_file(directory / name) for name in (PASSPORT_FILE, engine, *COMPANIONS)]
    found = tuple(_file(directory / name) for name in (PARITY_FILE, BISECT_FILE))
    return None if None in served[:2] else Signature(tuple(served), found)


def _file(file: Path) -> _File | None:
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size
