"""Check a model repository against its manifest, in the container that is to serve it, then start what follows.

Usage: ``python3 check_manifest.py REPOSITORY [-- COMMAND ...]``. Every file must be the one that was written, and no
folder may have another: Triton serves every model that it finds, in its highest version. Where there are TensorRT
plans, the container's TensorRT must be the version that built them: any other refuses a plan with a message that does
not say which one it wants. Standard library only, so that it runs in any container.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from pathlib import Path

MANIFEST = "manifest.json"
SCHEMA = "nxm-triton/1"
_LIBRARIES = ("libnvinfer.so", "libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so.8")


def installed_tensorrt() -> str | None:
    """major.minor.patch of the TensorRT library here, or None."""
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return version_text(int(library.getInferLibVersion()))
    return None


def version_text(number: int) -> str:
    """TensorRT's version number as text: 8601 is 8.6.1, 101401 is 10.14.1."""
    major, rest = divmod(number, 10000 if number >= 100000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def problems(repository: Path, tensorrt: str | None) -> list[str]:
    """Everything that does not fit; `tensorrt` is the version here."""
    try:
        manifest = json.loads((repository / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            return [
                f"{repository / MANIFEST}: schema {manifest['schema']} is not the {SCHEMA} that this program reads; "
                "take the check_manifest.py that was written with it"
            ]
        files, needed = dict(manifest["files"]), manifest["tensorrt"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{repository / MANIFEST}: cannot be read ({error!r})"]
    complaints = []
    for name, digest in files.items():
        file = repository / name
        if not file.is_file():
            complaints.append(f"{name} is missing")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            complaints.append(f"{name} is not the file that was written")
    complaints += [
        f"{name} was not written here, and Triton may serve it; remove it" for name in others(repository, files)
    ]
    if needed is not None and not same_version(needed, tensorrt):
        complaints.append(
            f"the plans were built by TensorRT {needed}, and this container has {tensorrt or 'none'}; "
            "take the container with that version, or build the engines again in this one"
        )
    return complaints


def others(repository: Path, files: dict[str, str]) -> list[str]:
    """Files in the folders of a repository that are none of `files`, but for what is hidden and what Python caches."""
    found = []
    for file in sorted(repository.rglob("*")):
        parts = file.relative_to(repository).parts
        if (
            len(parts) > 1
            and file.is_file()
            and not any(part.startswith(".") or part == "__pycache__" for part in parts)
        ):
            name = "/".join(parts)
            found += [name] if name not in files else []
    return found


def same_version(needed: str, actual: str | None) -> bool:
    """Whether major, minor and patch agree; a build number behind them does not matter to a plan."""
    return actual is not None and needed.split(".")[:3] == actual.split(".")[:3]


def main(arguments: list[str]) -> int:
    """Print what is wrong and return 1, or run the command."""
    repository, command = Path(arguments[0]), arguments[2:]
    complaints = problems(repository, installed_tensorrt())
    for problem in complaints:
        print(f"check_manifest: {problem}", file=sys.stderr)
    if complaints:
        return 1
    if command:
        os.execvp(command[0], command)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
