"""The group that all commands hang on: help in sections, exit codes, and one line for every error of ours."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TextIO

import click

from nxm_export import __version__
from nxm_export.cli.output import one_line
from nxm_export.errors import Notice, NxmError
from nxm_export.storage.atomic import FULL_ERRNOS, written_file

# The sections of `nxm --help`, in the order in which people need the commands.
SECTIONS = {
    "Make": ("run", "init", "compress", "search", "export", "build", "pack", "unpack"),
    "Prove": ("verify", "compare", "inspect", "bench", "latency"),
    "Run": ("predict", "serve", "triton"),
    "Look": ("doctor", "show", "report", "card", "completion"),
}
# Of a path that the system does not let us use, which no code of ours can mend.
_REFUSED_ERRNOS = frozenset({errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG})
_NAMES_WIDTH = 24  # of the options in a help text; what an option does gets the rest
_CLOSING = {"--json", "--help-all", "--help"}  # the last options of every help text
_HELP_ALL = "nxm_export.help_all"  # in the context: every option is asked for


class Command(click.Command):
    """A command with examples, and with options so rare that ``--help`` does not show them.

    `common` names the parameters that ``--help`` shows, in this order; the others are under ``--help-all``. Empty, it
    shows all.
    """

    examples: tuple[str, ...] = ()
    common: tuple[str, ...] = ()

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The text of the command, then its examples."""
        super().format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:  # not filled: a line is copied as it stands
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The common options, or with ``--help-all`` those and the others."""
        shown = self.get_params(ctx)
        first = [parameter for name in self.common for parameter in shown if parameter.name == name]
        rest = [parameter for parameter in shown if parameter not in first]
        closing = [parameter for parameter in rest if _CLOSING & {*parameter.opts}]
        rare = [parameter for parameter in rest if parameter not in closing]
        if not self.common:
            _write_options("Options", [*rare, *closing], ctx, formatter)
            return
        everything = ctx.meta.get(_HELP_ALL, False)
        _write_options("Options" if not everything else "Common options", [*first, *closing], ctx, formatter)
        if everything:
            _write_options("Further options", rare, ctx, formatter)


def _write_options(
    title: str, parameters: Sequence[click.Parameter], ctx: click.Context, formatter: click.HelpFormatter
) -> None:
    rows = [row for parameter in parameters if (row := parameter.get_help_record(ctx)) is not None]
    if rows:
        with formatter.section(title):
            formatter.write_dl(rows, col_max=_NAMES_WIDTH)


def _show_all(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        ctx.meta[_HELP_ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


class _Group(click.Group):
    """Turns our errors into one line and an exit code; anything else is a bug and keeps its traceback."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands by section, each with the first sentence of its text."""
        width = max(map(len, self.commands))
        limit = formatter.width - width - 4
        for section, names in SECTIONS.items():
            rows = [(f"{name:<{width}}", self.commands[name].get_short_help_str(limit)) for name in names]
            with formatter.section(section):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> object:
        _open_closed_streams()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", Notice)
                warnings.showwarning = _WarningLines()
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
            if error.errno not in FULL_ERRNOS and (error.errno not in _REFUSED_ERRNOS or not error.filename):
                raise
            file = written_file(error) or "a file"
            if error.errno in FULL_ERRNOS:
                click.echo(f"nxm: {file}: cannot be written ({error.strerror}); free the space", err=True)
            else:
                click.echo(
                    f"nxm: {file}: cannot be used ({error.strerror}); give access to it, or name another", err=True
                )
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("nxm: interrupted; run the same command again to go on from here", err=True)
            ctx.exit(130)


def _open_closed_streams() -> None:
    """Let a command that was started without stdout or stderr (``2>&-``) write to nowhere: Python has None in their
    place, and the next file or connection would get their number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


class _WarningLines:
    """Shows a notice of ours as one line, of the first process alone and once a command; other warnings as Python does.

    Python itself forgets what it has said whenever some code has set its filters, as for loading a model.
    """

    def __init__(self) -> None:
        self._said = set[str]()

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, Notice):
            click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)
        elif str(message) not in self._said and not int(os.environ.get("RANK", "0")):
            self._said.add(str(message))
            click.echo(f"note: {message}", err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="nxm")
def main() -> None:
    """Compress BERT-family encoders to N:M sparsity and low-bit integers; export, build, prove and run them.

    `nxm run` does all of it. `nxm COMMAND --help` has the options of a command, and examples.
    """
    command = click.get_current_context().invoked_subcommand
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command not in ("compress", "search"):
        raise click.UsageError(f"nxm {command} is no work for torchrun; only nxm compress and nxm search are")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub client is imported, which is later
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what matters of its warnings is an error of ours


def command(
    *examples: str, common: Sequence[str] = (), name: str | None = None
) -> Callable[[Callable[..., object]], Command]:
    """A command of `nxm`, which stands in `SECTIONS`. `nxm --help` has the first sentence of its docstring.

    `common` are the names of the parameters that ``--help`` shows; with any, ``--help-all`` shows the others.
    """

    def decorate(function: Callable[..., object]) -> Command:
        made = click.command(name, cls=Command)(function)
        main.add_command(made)
        made.examples, made.common = examples, tuple(common)
        if common:
            made.params.append(
                click.Option(
                    ["--help-all"],
                    is_flag=True,
                    is_eager=True,
                    expose_value=False,
                    callback=_show_all,
                    help="Show all options and exit.",
                )
            )
        return made

    return decorate


@command('eval "$(nxm completion bash)"', "nxm completion fish > ~/.config/fish/completions/nxm.fish")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    Put it where SHELL looks, or eval it. The script is text: there is no --json.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "nxm", "_NXM_COMPLETE").source())
