"""Command lines and variables in files for others' programs, as the command line reads them."""

import os
from collections.abc import Mapping, Sequence
from unittest.mock import patch

import click

from deploy.commands import command as command_of


def read(arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> dict[str, object]:
    """What ``roundhouse`` takes these arguments and variables for, and no others.

    Raises ``click.UsageError``.
    """
    name, *rest = arguments
    with (
        patch.dict(os.environ, variables or {}, clear=True),
        command_of(name).make_context(name, list(rest)) as context,
    ):
        return dict(context.params)


def unknown(variables: Mapping[str, str], command: str, others: Sequence[str] = ()) -> set[str]:
    """Those of the variables that neither the command nor anything else reads."""
    known = {name for param in command_of(command).params for name in _names_of(param)}
    return set(variables) - known - set(others)


def _names_of(param: click.Parameter) -> Sequence[str]:
    found = param.envvar or ()
    return (found,) if isinstance(found, str) else found
