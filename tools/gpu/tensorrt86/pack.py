"""Fetch TensorRT 8.6.0, a Python 3.10 with what our engines need, and cut both into chunks that travel.

    python -m tools.gpu.tensorrt86.pack [--fast]

What is there is kept: run the same command again after an interruption. Compressing takes long (about 1.2 MB/s of one
core: the builder resource of 991 MB comes to 255 MB); ``--fast`` compresses little, to rehearse the mechanics.

libnvinfer needs neither cuBLAS nor cuDNN. The bindings and the parser ask the plugin library for one function and the
Caffe and UFF parsers for a few, and the real libraries need cuBLAS and cuDNN; no engine of ours has a plugin, so stubs
stand in for them. (Stubs of cuBLAS itself do not load: "undefined symbol: cublasDestroy_v2".)
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools import ROOT
from tools.gpu.tensorrt86 import BASE, FOLDER, LIBRARIES, MANIFEST, VERSION
from tools.gpu.tensorrt86.manifest import Chunk, Manifest, Member, sha256_of
from tools.gpu.transfers import PART_MIB

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nxm-export" / "tensorrt86"
CHUNK_BYTES = PART_MIB << 20
SITE310 = (
    "numpy<2",
    "onnx==1.23.*",
    "onnx-ir",
    "ml-dtypes",
    "polygraphy",
    "safetensors",
    "msgspec",
    "click",
    "rich",
    "tokenizers",
    "typing_extensions",
)
SITE312 = ("msgspec",)  # the machine's own Python has torch, transformers, onnx and onnxscript
LEFT_OUT = ("__pycache__", "test", "tests", "site-packages", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3")
SYSTEM_LIBRARIES = ("libffi.so.8", "libz.so.1", "libbz2.so.1.0", "liblzma.so.5", "libuuid.so.1")
PLUGIN_STUB = "#include <stdbool.h>\nbool initLibNvInferPlugins(void* logger, const char* name) { return true; }\n"
PARSER_SYMBOLS = (
    "_ZN11nvuffparser15createUffParserEv",
    "_ZN11nvuffparser23shutdownProtobufLibraryEv",
    "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi",
    "_ZN11nvuffparser8FieldMapC2EPKcPKvNS_9FieldTypeEi",
    "_ZN14nvcaffeparser117createCaffeParserEv",
    "_ZN14nvcaffeparser123shutdownProtobufLibraryEv",
)


class CannotPack(Exception):
    """What is missing on this machine."""


def fetch() -> Path:
    """The unpacked wheel, every file as NVIDIA's RECORD has it; returns its ``tensorrt`` folder."""
    unpacked, wheels = CACHE / "wheel", CACHE / "download"
    if not (unpacked / "verified").is_file():
        platforms = ("manylinux_2_17_x86_64", "linux_x86_64")
        _pip(
            "download", "--no-deps", "--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp",
            *(f"--platform={name}" for name in platforms), "-d", str(wheels), f"tensorrt=={VERSION}",
        )  # fmt: skip
        with zipfile.ZipFile(next(wheels.glob(f"tensorrt-{VERSION}-cp310-*.whl"))) as archive:
            archive.extractall(unpacked)
        verify(unpacked)
        (unpacked / "verified").touch()
    return unpacked / "tensorrt"


def verify(unpacked: Path) -> None:
    """Raise `CannotPack` for a file that is not what the wheel's RECORD says."""
    with (unpacked / f"tensorrt-{VERSION}.dist-info" / "RECORD").open(encoding="utf-8", newline="") as stream:
        for name, digest, _ in csv.reader(stream):
            if digest and name.startswith("tensorrt/"):
                hashed = hashlib.sha256()
                with (unpacked / name).open("rb") as file:
                    while block := file.read(1 << 24):
                        hashed.update(block)
                actual = base64.urlsafe_b64encode(hashed.digest()).rstrip(b"=").decode()
                if actual != digest.partition("=")[2]:
                    raise CannotPack(f"{name} is not what the wheel's RECORD says; remove {unpacked} and run again")


def make_base(wheel: Path) -> Path:
    """A folder with Python 3.10 (py), its packages (site), system libraries (lib), bindings and stubs (trt), and
    site312."""
    base = CACHE / BASE
    if (base / "complete").is_file():
        return base
    shutil.rmtree(base, ignore_errors=True)
    python = python310()
    home = python.parent.parent
    (base / "py" / "bin").mkdir(parents=True)
    (base / "lib").mkdir()
    shutil.copy(python, base / "py" / "bin" / "python3.10")
    ignored = shutil.ignore_patterns(*LEFT_OUT, "config-*", "*.a")
    shutil.copytree(home / "lib" / "python3.10", base / "py" / "lib" / "python3.10", ignore=ignored)
    shared = home / "lib" / "libpython3.10.so.1.0"
    if shared.is_file():
        shutil.copy(shared, base / "py" / "lib")
    for name, file in system_libraries().items():
        shutil.copy(file, base / "lib" / name)
    for version, folder, packages in (("3.10", "site", SITE310), ("3.12", "site312", SITE312)):
        platforms = ("manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_27_x86_64")
        _pip(
            "install", "--no-compile", "--only-binary=:all:", "--python-version", version, "--implementation", "cp",
            *(f"--platform={name}" for name in platforms), "--target", str(base / folder), *packages,
        )  # fmt: skip
    _trim(base)
    trt = base / "trt" / "tensorrt"
    trt.mkdir(parents=True)
    for name in ("__init__.py", "tensorrt.so"):
        shutil.copy(wheel / name, trt)
    parsers = "".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in PARSER_SYMBOLS)
    stub(PLUGIN_STUB, trt / "libnvinfer_plugin.so.8")
    stub(parsers, trt / "libnvparsers.so.8")
    (base / "complete").touch()
    return base


def python310() -> Path:
    """A Python 3.10 of this machine that can be carried."""
    named = os.environ.get("PYTHON310")
    versions = sorted(map(str, Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10")), reverse=True)
    for candidate in (named, *versions, shutil.which("python3.10")):
        if candidate and Path(candidate).is_file():
            return Path(candidate).resolve()
    raise CannotPack("no Python 3.10 here; name one in PYTHON310")


def system_libraries() -> dict[str, Path]:
    """Libraries that Python's own modules need and that another system may lack, those of them that are here."""
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    lines = re.findall(r"^\s*(\S+) .*=> (\S+)$", listed, re.MULTILINE)
    known = {name: Path(file) for name, file in reversed(lines)}
    return {name: known[name] for name in SYSTEM_LIBRARIES if name in known}


def stub(source: str, out: Path) -> None:
    """Compile a shared library from a text of C."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise CannotPack("no C compiler here (gcc)")
    options = ["-shared", "-fPIC", "-s", "-O1", f"-Wl,-soname,{out.name}", "-o", str(out), "-x", "c", "-"]
    done = subprocess.run([compiler, *options], input=source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotPack(f"{out.name} cannot be compiled: {done.stderr[-500:]}")


def compress(wheel: Path, base: Path, *, fast: bool) -> list[tuple[str, Path]]:
    """Every member as an xz file, base first: what it holds is useful from the first chunk on."""
    folder = CACHE / ("fast" if fast else "small")
    folder.mkdir(parents=True, exist_ok=True)
    archive = CACHE / "base.tar"
    if not archive.is_file():
        with tarfile.open(archive, "w") as tar:
            for name in sorted(path.name for path in base.iterdir() if path.is_dir()):
                tar.add(base / name, name)
    level = ["-1"] if fast else ["--lzma2=preset=9e,dict=512MiB"]
    members = [(BASE, archive), *((name, wheel / name) for name in LIBRARIES)]
    for name, file in members:
        packed = folder / f"{name}.xz"
        if not packed.is_file():
            scratch = packed.with_suffix(".partial")
            with scratch.open("wb") as stream:
                subprocess.run(["nice", "-n", "10", "xz", "-T1", *level, "-c", str(file)], stdout=stream, check=True)
            scratch.replace(packed)
    return [(name, folder / f"{name}.xz") for name, _ in members]


def cut(members: Sequence[tuple[str, Path]], wheel: Path, out: Path, chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    """Write the members as chunks ``c01/part``, ``c02/part`` ... to `out`, and their manifest."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("c[0-9]*"):
        shutil.rmtree(old)
    chunks = []
    for number, data in enumerate(_pieces([file for _, file in members], chunk_bytes), start=1):
        folder = out / f"c{number:02d}"
        folder.mkdir()
        (folder / "part").write_bytes(data)
        chunks.append(Chunk(folder.name, len(data), hashlib.sha256(data).hexdigest()))
    rows = [
        Member(name, file.stat().st_size, None if name == BASE else sha256_of(wheel / name)) for name, file in members
    ]
    manifest = Manifest(tuple(rows), tuple(chunks))
    manifest.write(out / MANIFEST.name)
    return manifest


def _pieces(files: Sequence[Path], size: int) -> Iterator[bytes]:
    buffer = bytearray()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                buffer += block
                while len(buffer) >= size:
                    yield bytes(buffer[:size])
                    del buffer[:size]
    if buffer:
        yield bytes(buffer)


def _trim(base: Path) -> None:
    """Remove what no one imports there, and symbols of debuggers."""
    for path in sorted(base.rglob("*"), reverse=True):
        drop = (
            path.suffix in (".pyi", ".h")
            or path.name == "__pycache__"
            or (path.name == "tests" and "site" in path.parts)
        )
        if drop and path.is_dir():
            shutil.rmtree(path)
        elif drop and path.is_file():
            path.unlink()
    libraries = [str(path) for path in base.rglob("*.so*") if path.is_file()]
    strip = shutil.which("strip")
    if strip is not None:
        subprocess.run(
            [strip, "--strip-unneeded", *libraries], capture_output=True, check=False
        )  # some cannot be stripped


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotPack(f"pip {arguments[0]} failed: {done.stderr.strip()[-1000:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu.tensorrt86.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fast", action="store_true", help="compress little: more chunks, in a minute")
    options = parser.parse_args(arguments)
    try:
        if shutil.which("xz") is None:
            raise CannotPack("no xz here")
        wheel = fetch()
        members = compress(wheel, make_base(wheel), fast=options.fast)
    except CannotPack as error:
        print(f"tools.gpu.tensorrt86.pack: {error}", file=sys.stderr)
        return 1
    manifest = cut(members, wheel, FOLDER)
    total = sum(chunk.bytes for chunk in manifest.chunks) / 2**20
    print(f"{len(manifest.chunks)} chunks, {total:.1f} MiB, in {FOLDER.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
