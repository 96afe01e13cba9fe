"""The models of a server by name and version, and their reload.

Names are looked up in a dict; no part of a request ever becomes a path. A changed engine directory is loaded beside the
old engine, checked and warmed up like at the start, and takes its place between two requests; the old engine answers
what it has and goes. A directory that is refused leaves the old engine serving, whose file was verified when it was
read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.passport import PASSPORT_FILE, load_passport
from engines.serving.model import TEXT_SUFFIX, Endpoint, Model, open_model
from engines.serving.settings import ModelOptions
from nxm_export.errors import NxmError, RequestRefused, ServeError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_VERSION = re.compile(r"[1-9][0-9]{0,17}\Z")
Signature = tuple[tuple[int, int, int], ...]


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
        self._pending: dict[tuple[str, str], Signature | None] = {}
        self.retired: list[Model] = []
        self._sources = {(source.name, source.version): source for source in sources}
        if len(self._sources) != len(sources):
            raise ServeError("two engine directories have the same name and version; write NAME:VERSION=ENGINE_DIR")
        self._endpoints: dict[str, dict[str, Endpoint]] = {}

    def open(self) -> None:
        """Load all models; raises what `open_model` raises for the first that is refused, and before any is loaded
        `ServeError` for names that collide."""
        if self._options.text:
            require_distinct_names(list(self._sources.values()), [TEXT_SUFFIX])
        try:
            for key, source in self._sources.items():
                self._seen[key] = signature(source.directory)
                self._put(key, open_model(source.name, source.version, source.directory, self._options))
        except BaseException:
            self.close()
            raise

    @property
    def models(self) -> list[Model]:
        """Every model that serves."""
        return list(self._models.values())

    def find(self, name: str, version: str | None) -> Endpoint:
        """An endpoint by name, of the highest version where none is asked for; raises `RequestRefused` (404)."""
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
        return [
            {"name": name, "version": version, "state": "READY", "reason": ""}
            for name in self._endpoints
            for version in self.versions(name)
        ]

    def changed(self) -> list[tuple[str, str]]:
        """Keys whose directory changed since it was loaded, and has held still since the last call.

        A directory that is being written, or replaced at this moment, is left for the next call.
        """
        keys = []
        for key, source in self._sources.items():
            now = signature(source.directory)
            if now is None or now == self._seen[key]:
                self._pending.pop(key, None)
            elif self._pending.get(key) == now:
                keys.append(key)
            else:
                self._pending[key] = now
        return keys

    def begin_reload(self, key: tuple[str, str]) -> Callable[[], Model]:
        """A function that loads a changed directory (and blocks: call it off the event loop; raises like `open_model`).

        A directory that it refuses is not tried again until it changes again.
        """
        source = self._sources[key]
        self._seen[key] = self._pending.pop(key)
        return lambda: open_model(source.name, source.version, source.directory, self._options)

    def replace(self, key: tuple[str, str], model: Model) -> None:
        """Let `model` serve from now on; the old one is in `retired` until nobody uses it."""
        self.retired.append(self._models[key])
        self._put(key, model)

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


def require_distinct_names(sources: Sequence[EngineSource], suffixes: Sequence[str]) -> None:
    """Raise `ServeError` if a name is that of a model and, with one of `suffixes`, of what belongs to another model.

    No version makes that right: whoever asks for the highest one would get this or that.
    """
    names = {source.name for source in sources}
    for name in sorted(names):
        for suffix in suffixes:
            if name + suffix in names:
                raise ServeError(
                    f"{name + suffix} is both a model and the text frontend of {name}, or a part of it; choose another "
                    "name"
                )


def signature(directory: Path) -> Signature | None:
    """What changes when an engine directory is written again; None while it is not whole."""
    try:
        engine = directory / load_passport(directory).engine
        files = [(directory / PASSPORT_FILE).stat(), engine.stat()]
    except (OSError, NxmError):
        return None
    return tuple((file.st_ino, file.st_mtime_ns, file.st_size) for file in files)
