"""Commands that serve engines: serve, triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

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
from nxm_export.cli.output import show_result
from nxm_export.cli.tables import print_table


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
    "--buckets", metavar="N,N,...", help="Lengths that requests are padded to.  [default: steps of an eighth]"
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
    serve_engines([EngineSource.parse(text) for text in engines], models, server)


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
    from engines.serving.repository import EngineSource
    from engines.triton import export_repository

    options = settings_of(TritonOptions, values)
    options = replace(
        options,
        text=options.text or options.pair,
        image=image or TRITON_IMAGE,
        expect_sha256=expected_hashes(values),
    )
    manifest = export_repository([EngineSource.parse(text) for text in engines], out, options)
    for name, engines_of_it in manifest.models.items():
        for facts in engines_of_it:
            if facts.session is not None and facts.session.difference != 0:
                click.echo(f"nxm: {name}: its session in Triton: {facts.session.words}", err=True)
    files = list(manifest.files.items())
    show_result(manifest.to_dict, json, lambda: print_table(str(out), ("file", "sha256"), files))
