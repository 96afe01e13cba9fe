"""Commands that serve engines: serve, triton."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from json import dumps as json_text
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engines.serving.settings import (
    TRITON_IMAGE,
    ConnectionLimits,
    ModelOptions,
    RequestLimits,
    ServerOptions,
    TritonOptions,
)
from nxm_export.cli.group import command
from nxm_export.cli.options import (
    expect_sha256_option,
    expected_hashes,
    json_option,
    numbers_of,
    setting_option,
    settings_of,
    typed,
)
from nxm_export.cli.output import print_next, quoted, show_result
from nxm_export.cli.tables import print_table
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import NxmError

if TYPE_CHECKING:
    from engines.serving.repository import EngineSource


@dataclass(frozen=True)
class _ServeOptions:
    """The options of ``nxm serve`` that stand for no setting as they are."""

    buckets: str | None


@command(
    "nxm serve engine --text --port 8000",
    "nxm serve film=engines/a film:2=engines/b --parity passed",
    common=("host", "port", "text", "instances", "threads", "max_batch", "max_queue", "timeout", "gate", "access_log"),
)
@click.argument("engines", metavar="[NAME[:VERSION]=]ENGINE...", nargs=-1, required=True)
@setting_option(ServerOptions, "host")
@setting_option(ServerOptions, "port")
@setting_option(ServerOptions, "allow_remote")
@setting_option(ModelOptions, "text")
@setting_option(ModelOptions, "instances")
@setting_option(ModelOptions, "threads")
@setting_option(ModelOptions, "max_batch")
@setting_option(ModelOptions, "max_batch_tokens")
@setting_option(ModelOptions, "merge")
@setting_option(ModelOptions, "max_delay")
@click.option(
    "--buckets",
    metavar="N,N,...",
    help="Lengths that requests are padded to.  [default: 4, 8, ... 32, 40, ... 64, 80, ...: four to a doubling]",
)
@setting_option(ModelOptions, "max_queue")
@setting_option(RequestLimits, "timeout")
@setting_option(RequestLimits, "max_body")
@setting_option(ConnectionLimits, "connections")
@setting_option(ConnectionLimits, "read_timeout")
@setting_option(ModelOptions, "gate")
@expect_sha256_option
@setting_option(ServerOptions, "watch")
@setting_option(ServerOptions, "drain")
@setting_option(ServerOptions, "shutdown_delay")
@setting_option(ServerOptions, "access_log")
def serve(engines: tuple[str, ...], **values: object) -> None:
    """Serve engines over HTTP, by the Open Inference Protocol.

    Clients of Triton and KServe work. ENGINE is a directory. It serves until SIGTERM and prints logs: there is no
    --json.
    """
    from engines.serving.repository import EngineSource
    from engines.serving.server import serve as serve_engines

    options = typed(_ServeOptions, values)
    models = replace(
        settings_of(ModelOptions, values),
        lengths=numbers_of(options.buckets, "--buckets", "lengths") if options.buckets else None,
        expect_sha256=expected_hashes(values),
    )
    server = replace(
        settings_of(ServerOptions, values),
        requests=settings_of(RequestLimits, values),
        connections=settings_of(ConnectionLimits, values),
    )
    sources = [EngineSource.parse(text) for text in engines]
    if server.port and sys.stderr.isatty():  # for people; a log has JSON alone
        with suppress(NxmError):  # which the server raises itself
            print_next(curl_of(sources[0], server, text=models.text), "once it listens")
    serve_engines(sources, models, server)


def curl_of(source: EngineSource, server: ServerOptions, *, text: bool) -> str:
    """A request to the server as a line for the shell: two tokens, or a text where the model takes texts."""
    spec = load_spec(source.directory)
    if text:
        words = ("text", "text_pair") if TASKS[spec.task].texts == "two" else ("text",)
        inputs = [{"name": name, "datatype": "BYTES", "shape": [1, 1], "data": ["a good film"]} for name in words]
    else:
        inputs = [{"name": name, "datatype": "INT64", "shape": [1, 2], "data": [1, 1]} for name in spec.inputs]
    host = f"[{server.host}]" if ":" in server.host else server.host
    name = f"{source.name}_text" if text else source.name
    body = json_text({"inputs": inputs})
    return f"curl http://{host}:{server.port}/v2/models/{name}/infer -d {shlex.quote(body)}"


@command(
    "nxm triton engine --text --out triton-repository",
    "nxm triton film=engine-sm80 film=engine-sm90 --out triton-repository",
)
@click.argument("engines", metavar="[NAME=]ENGINE...", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Model repository to write.")
@setting_option(TritonOptions, "gate")
@expect_sha256_option
@setting_option(TritonOptions, "text")
@setting_option(TritonOptions, "pair")
@setting_option(TritonOptions, "kind")
@setting_option(TritonOptions, "instances")
@setting_option(TritonOptions, "threads")
@setting_option(TritonOptions, "max_batch")
@setting_option(TritonOptions, "max_batch_tokens")
@click.option("--image", help="Triton container.  [default: the release that the tests run]")
@setting_option(TritonOptions, "tensorrt")
@json_option
def triton(engines: tuple[str, ...], out: Path, image: str | None, json: bool, **values: object) -> None:
    """Write a model repository for Triton from engines.

    ENGINE is a directory. Several of one NAME are one model for several GPUs.
    """
    from engines.ort.backend import wants_newer_runtime
    from engines.passport import load_passport
    from engines.serving.repository import EngineSource
    from engines.triton import export_repository

    options = settings_of(TritonOptions, values)
    options = replace(
        options,
        image=image or TRITON_IMAGE,
        expect_sha256=expected_hashes(values),
    )
    sources = [EngineSource.parse(text) for text in engines]
    manifest = export_repository(sources, out, options)
    for name, engines_of_it in manifest.models.items():
        for facts in engines_of_it:
            if facts.session is not None and facts.session.difference != 0:
                click.echo(f"nxm: {name}: its session in Triton: {facts.session.words}", err=True)
    files = [(file, digest[:12]) for file, digest in manifest.files.items()]

    def show() -> None:
        click.echo(f"Written: {', '.join(manifest.models)} for {manifest.image}.")
        print_table(str(out), ("file", "sha256 begins"), files)
        if image is None and any(wants_newer_runtime(load_passport(source.directory)) for source in sources):
            print_next("nxm build GRAPH --onnxruntime 1.19 --out ENGINE", "for this container, or name a newer --image")
        else:
            print_next(f"docker compose -f {quoted(out / 'compose.yaml')} up --build")

    show_result(manifest.to_dict, json, show)
