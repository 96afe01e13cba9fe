"""The group that all commands hang on: exit codes, and one line for every error of ours."""

from __future__ import annotations

import os
import warnings
from typing import TextIO

import click

from nxm_export import __version__
from nxm_export.cli.output import one_line
from nxm_export.errors import Notice, NxmError
from nxm_export.storage.atomic import FULL_ERRNOS


class _Group(click.Group):
    """Turns our errors into one line and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", Notice)
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except NxmError as error:
            click.echo(f"nxm: {one_line(str(error))}", err=True)
            ctx.exit(error.exit_code)
        except ModuleNotFoundError as error:
            from nxm_export.pipeline.environment import extra_of, install_advice

            extra = extra_of(error.name)
            if extra is None:
                raise
            click.echo(f"nxm: this needs {error.name}, which is not installed; {install_advice(extra)}", err=True)
            ctx.exit(1)
        except OSError as error:
            if error.errno not in FULL_ERRNOS:
                raise
            click.echo(
                f"nxm: {error.filename or 'a file'}: cannot be written ({error.strerror}); free the space", err=True
            )
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("nxm: interrupted; run the same command again to go on from here", err=True)
            ctx.exit(130)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A notice of ours as one line, of the first process alone; other warnings as Python shows them."""
    if not issubclass(category, Notice):
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)
    elif not int(os.environ.get("RANK", "0")):
        click.echo(f"note: {message}", err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="nxm")
def main() -> None:
    """Compress BERT-family encoders to N:M sparsity and low-bit integers; export, build, prove and run them."""
    command = click.get_current_context().invoked_subcommand
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command not in ("compress", "search"):
        raise click.UsageError(f"nxm {command} is no work for torchrun; only nxm compress and nxm search are")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub client is imported, which is later
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what matters of its warnings is an error of ours


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL; put it where that shell looks, or eval it."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "nxm", "_NXM_COMPLETE").source())
