"""``--config FILE``: the options of ``roundhouse serve`` in a TOML file.

Keys are the names of the options, with dashes or underscores; MODEL is ``model``. Options that may
be repeated take a list, those of the form KEY=VALUE a table as well. Each ``[[group]]`` is one
``--group``. What the command line or the environment says wins over the file.
"""

import tomllib
from pathlib import Path
from typing import Any

import click


def option_name(key: str) -> str:
    """The name of an option as the command line has it."""
    return key.replace("_", "-")


def read(path: Path, command: click.Command) -> dict[str, Any]:
    """The file's values by parameter of the command, as the command line would have them.

    Raises ``click.UsageError`` with one line that names the file.
    """
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise click.UsageError(f"config file {path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise click.UsageError(f"config file {path}: {error}") from error
    known = {_key(param): param for param in command.params if param.name != "config"}
    unknown = [key for key in found if option_name(key) not in known]
    if unknown:
        raise click.UsageError(
            f"config file {path}: unknown keys: {', '.join(unknown)}; "
            f"'roundhouse {command.name} --help' lists the options"
        )
    values = {}
    for key, value in found.items():
        param = known[option_name(key)]
        try:
            values[str(param.name)] = (
                _groups(value) if param.name == "group" else as_typed(value, param.multiple)
            )
        except ValueError as error:
            raise click.UsageError(f"config file {path}: {key} {error}") from error
    return values


def as_typed(value: object, multiple: bool) -> str | list[str]:
    """What a person would type for a value; raises ``ValueError`` if there is no such thing."""
    if not multiple:
        return _scalar(value)
    if isinstance(value, dict):
        return [f"{key}={_scalar(one)}" for key, one in value.items()]
    return [_scalar(one) for one in value] if isinstance(value, list) else [_scalar(value)]


def _groups(value: object) -> list[object]:
    """The tables of the groups, or texts as on the command line."""
    if isinstance(value, list) and all(isinstance(one, dict | str) for one in value):
        return value
    raise ValueError("must be tables, each headed [[group]]")


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"must be a text, a number, true or false, not {value!r}")


def _key(param: click.Parameter) -> str:
    """The name by which the file knows a parameter: its long option, or that of an argument."""
    longest = max(param.opts, key=len)
    return longest.lstrip("-")
