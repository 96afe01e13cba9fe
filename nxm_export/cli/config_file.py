"""``nxm.toml``: options of `nxm run` in a file. `nxm init` writes one, `--config` reads it; the command line wins."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

from nxm_export.errors import ArtifactError, NxmError, PlanError

CONFIG_FILE = "nxm.toml"
# What a file need not say: what asks for help, for another file, or for another form of the answer.
_NOT_KEYS = ("help", "help_all", "config", "json", "demo", "dry_run")


def key_of(parameter: click.Parameter) -> str | None:
    """A parameter's name in the file: that of its option without the dashes; None for one that has no place there."""
    if parameter.name in _NOT_KEYS:
        return None
    longest = max(parameter.opts, key=len)
    return longest.removeprefix("--")


def keys_of(command: click.Command) -> dict[str, click.Parameter]:
    """The parameters of a command by their names in the file."""
    named = ((key_of(parameter), parameter) for parameter in command.params)
    return {key: parameter for key, parameter in named if key is not None}


def load_config(ctx: click.Context, _: click.Parameter, file: Path | None) -> Path | None:
    """The callback of ``--config``: what the file says becomes the defaults of the command's options."""
    if file is not None:
        ctx.default_map = {**(ctx.default_map or {}), **_checked(_read(file), keys_of(ctx.command), file)}
    return file


def _read(file: Path) -> Mapping[str, object]:
    """The table of a TOML file; raises `ArtifactError` where it is none, and `NxmError` where this Python has no
    parser."""
    import msgspec

    try:
        return msgspec.toml.decode(file.read_bytes(), type=dict[str, object])
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror}); `nxm init` writes one") from error
    except ImportError as error:
        raise NxmError(
            f"{file}: reading TOML needs Python 3.11 or newer, or the package tomli here: pip install tomli"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{file}: not a table in TOML ({error}); `nxm init` writes one") from error


def _checked(table: Mapping[str, object], keys: Mapping[str, click.Parameter], file: Path) -> dict[str, object]:
    """Values by parameter, each in the form in which a command line would give it; `PlanError` by key."""
    values: dict[str, object] = {}
    for key, value in table.items():
        parameter = keys.get(key)
        if parameter is None:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]}?" if near else "`nxm init` writes a file with all keys"
            raise PlanError(f"{file}: unknown key {key!r}; {hint}")
        values[str(parameter.name)] = _as_given(value, parameter, f"{file}: {key}")
    return values


def _as_given(value: object, parameter: click.Parameter, where: str) -> object:
    """A value as text, which the option itself checks; a flag as true or false, a list where an option may repeat."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise PlanError(f"{where} is true or false, got {value!r}")
        return value
    if getattr(parameter, "multiple", False):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise PlanError(f'{where} is a list of texts, as in ["a", "b"], got {value!r}')
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise PlanError(f"{where} is one number or text, got {value!r}")
    return str(value)


def config_text(command: click.Command, given: Mapping[str, str]) -> str:
    """A file with every option of `command` as a comment, with its default; those that are `given` stand in it."""
    lines = [
        f"# {CONFIG_FILE}: the options of `nxm {command.name}`. Take the # off a line to change it.",
        f"#     nxm {command.name} --config {CONFIG_FILE}",
        "# What stands on the command line wins. Paths are relative to where the command runs.",
    ]
    ctx = click.Context(command)
    for key, parameter in keys_of(command).items():
        lines += ["", *_described(parameter)]
        if key in given:
            lines.append(f"{key} = {_toml(given[key])}")
        else:
            default = parameter.get_default(ctx)
            lines.append(f"# {key} = {_toml(default if _is_value(default) else _placeholder(parameter))}")
    return "\n".join(lines) + "\n"


def _described(parameter: click.Parameter) -> Iterator[str]:
    """What an option's help says, and its choices, as comment lines."""
    text = " ".join(str(getattr(parameter, "help", None) or "").split())
    if isinstance(parameter, click.Argument):
        text = f"{parameter.human_readable_name}, which has no name on the command line."
    if isinstance(parameter.type, click.Choice) and not all(str(choice) in text for choice in parameter.type.choices):
        text += f" One of {', '.join(map(str, parameter.type.choices))}."
    yield from textwrap.wrap(text, 76, initial_indent="# ", subsequent_indent="# ")


def _is_value(default: object) -> bool:
    return isinstance(default, (bool, int, float, str)) or (isinstance(default, (list, tuple)) and bool(default))


def _placeholder(parameter: click.Parameter) -> object:
    """What stands for a default that is none: an empty list, or a text in the option's own words."""
    return [] if getattr(parameter, "multiple", False) else parameter.metavar or parameter.type.name.upper()


def _toml(value: object) -> str:
    """A value as TOML writes it; texts are escaped as in JSON, which TOML's basic strings take."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
