"""How commands are run to their end."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any

import click

from deploy.options import ToldAsJson, UserError
from router.config import ConfigError
from shards.interrupts import STATUS, end_quietly, interrupt, quietly


def run_command(command: click.Command, name: str) -> None:
    """Runs a console script: every error that the user can cause is one line on standard error."""
    _hold_standard_streams()
    try:
        interrupt()
        status = command.main(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        end_quietly()
        _tell(name, error)
        sys.exit(error.status if isinstance(error, ToldAsJson) else error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(STATUS)
    finally:
        end_quietly()
        _give_up_unwritten_lines()
    sys.exit(status if isinstance(status, int) else 0)


def _tell(name: str, error: click.ClickException) -> None:
    """The one line: of a command that was to speak JSON as an object, as its log's lines are."""
    line = " ".join(error.format_message().split())
    if not (isinstance(error, ToldAsJson) or _json_is_asked_for()):
        click.echo(f"{name}: error: {line}", err=True)
        return
    from router.logs import formatter

    record = logging.LogRecord(name, logging.ERROR, "", 0, line, None, None)
    click.echo(formatter(as_json=True).format(record), err=True)


def _json_is_asked_for() -> bool:
    """Whether a command line that could not be read asks for it, or the environment does."""
    given = os.environ.get("JSON_OUTPUT", "").strip().lower()
    return "--json-output" in sys.argv or given in ("1", "true", "t", "yes", "y", "on")


def _hold_standard_streams() -> None:
    """Opens those of the three standard streams that were closed by whoever started this.

    Their numbers would go to sockets, into which lines for a person would be written, and which
    uvloop refuses to close.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))


def _give_up_unwritten_lines() -> None:
    """Keeps the exit status the command's own where standard error takes nothing: a full disk.

    Python tries once more at its end, and would end with 120.
    """
    try:
        sys.stderr.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs until served out; what the user can mend becomes one line."""
    with quietly():
        import uvloop

        from deploy.keeper import StartError
        from router.faces import raise_file_limit

    raise_file_limit()
    try:
        uvloop.run(main)
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    except (StartError, ConfigError, OSError) as error:
        raise UserError(str(error)) from error
    finally:
        main.close()  # if Ctrl-C has come before it began
