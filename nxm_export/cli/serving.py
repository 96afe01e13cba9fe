"""Commands that serve engines: serve, triton."""

from __future__ import annotations

from pathlib import Path

import click

from nxm_export.cli.group import main
from nxm_export.cli.options import json_option, numbers_of
from nxm_export.cli.output import show_result
from nxm_export.cli.tables import print_table
from nxm_export.storage.json_files import Json


@main.command()
@click.argument("engines", metavar="[NAME[:VERSION]=]ENGINE_DIR...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--allow-remote", is_flag=True, help="Listen beyond this machine. There is no authentication.")
@click.option("--text", is_flag=True, help="Serve NAME_text, too: sentences in, class names out.")
@click.option(
    "--instances", type=click.IntRange(min=1), help="Copies of each engine.  [default: CPU cores; 1 on a GPU]"
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each copy.  [default: cores / instances]")
@click.option("--max-batch", type=click.IntRange(min=1), default=32, show_default=True, help="Rows of a request.")
@click.option(
    "--merge",
    type=click.IntRange(min=1),
    help="Rows of different requests in a batch.  [default: 4 on a CPU, else --max-batch]",
)
@click.option("--max-delay-ms", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Wait for company.")
@click.option(
    "--buckets", metavar="N,N,...", help="Lengths that requests are padded to.  [default: steps of an eighth]"
)
@click.option("--max-queue", type=click.IntRange(min=1), default=512, show_default=True, help="Rows that may wait.")
@click.option("--timeout-ms", type=click.FloatRange(min=1), default=10000.0, show_default=True, help="Deadline.")
@click.option("--max-body-mb", type=click.FloatRange(min=0.001), default=4.0, show_default=True)
@click.option("--max-connections", type=click.IntRange(min=1), default=512, show_default=True)
@click.option(
    "--read-timeout-ms",
    type=click.FloatRange(min=1),
    default=10000.0,
    show_default=True,
    help="For a request to arrive.",
)
@click.option(
    "--gate",
    type=click.Choice(["not-failed", "passed", "off"]),
    default="not-failed",
    show_default=True,
    help="Which parity.json an engine must have.",
)
@click.option(
    "--expect-sha256", multiple=True, metavar="HEX", help="Serve only engines of these hashes; may be repeated."
)
@click.option(
    "--watch-seconds",
    type=click.FloatRange(min=0),
    default=2.0,
    show_default=True,
    help="Look for changed engines; 0 never.",
)
@click.option(
    "--drain-seconds", type=click.FloatRange(min=0), default=30.0, show_default=True, help="How long SIGTERM may take."
)
@click.option("--access-log", is_flag=True, help="Log every inference request.")
def serve(engines: tuple[str, ...], **options: Json) -> None:
    """Serve ENGINE_DIRs over HTTP (Open Inference Protocol v2: tritonclient and KServe clients work) until SIGTERM."""
    from engines.serving.app import RequestLimits
    from engines.serving.connection import ConnectionLimits
    from engines.serving.model import ModelOptions
    from engines.serving.repository import EngineSource
    from engines.serving.server import ServerOptions
    from engines.serving.server import serve as serve_engines

    serve_engines(
        [EngineSource.parse(text) for text in engines],
        ModelOptions(
            instances=options["instances"],
            threads=options["threads"],
            max_batch=options["max_batch"],
            lengths=numbers_of(options["buckets"], "--buckets", "lengths") if options["buckets"] else None,
            merge=options["merge"],
            max_queue=options["max_queue"],
            max_delay=options["max_delay_ms"] / 1e3,
            text=options["text"],
            gate=options["gate"],
            expect_sha256=frozenset(digest.lower() for digest in options["expect_sha256"]),
        ),
        ServerOptions(
            host=options["host"],
            port=options["port"],
            allow_remote=options["allow_remote"],
            drain=options["drain_seconds"],
            watch=options["watch_seconds"],
            access_log=options["access_log"],
            requests=RequestLimits(int(options["max_body_mb"] * 2**20), options["timeout_ms"] / 1e3),
            connections=ConnectionLimits(options["max_connections"], options["read_timeout_ms"] / 1e3),
        ),
    )


@main.command()
@click.argument("engines", metavar="[NAME=]ENGINE_DIR...", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Model repository to write.")
@click.option("--text", is_flag=True, help="Add NAME_text: sentences in, class names out.")
@click.option("--text-pair", is_flag=True, help="The same for models of two sentences.")
@click.option("--kind", type=click.Choice(["cpu", "gpu"]), help="Where instances run.  [default: as built]")
@click.option("--instances", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of an ONNX Runtime instance.")
@click.option("--max-batch", type=click.IntRange(min=1), default=32, show_default=True, help="Rows of a batch.")
@click.option("--image", help="Triton container.  [default: the release that the tests run]")
@click.option(
    "--container-tensorrt", metavar="X.Y.Z", help="TensorRT in that container; refuse engines that need another."
)
@json_option
def triton(engines: tuple[str, ...], out: Path, json: bool, **options: Json) -> None:
    """Write a Triton model repository from ENGINE_DIRs; several of one NAME are one model for several GPUs."""
    from engines.serving.repository import EngineSource
    from engines.triton import TritonOptions, export_repository
    from engines.triton.deploy import DEFAULT_IMAGE

    manifest = export_repository(
        [EngineSource.parse(text) for text in engines],
        out,
        TritonOptions(
            text=options["text"] or options["text_pair"],
            pair=options["text_pair"],
            kind=options["kind"],
            instances=options["instances"],
            threads=options["threads"],
            max_batch=options["max_batch"],
            image=options["image"] or DEFAULT_IMAGE,
            tensorrt=options["container_tensorrt"],
        ),
    )
    files = list(manifest.files.items())
    show_result(manifest.to_dict, json, lambda: print_table(str(out), ("file", "sha256"), files))
