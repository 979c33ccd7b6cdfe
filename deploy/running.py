"""How commands are run to their end."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any

import click

from deploy.options import UserError
from router.config import ConfigError


def run_command(command: click.Command, name: str) -> None:
    """Runs a console script: every error that the user can cause is one line on standard error."""
    try:
        status = command.main(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        line = " ".join(error.format_message().split())
        click.echo(f"{name}: error: {line}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs until served out; what the user can mend becomes one line."""
    import uvloop

    from deploy.supervisor import StartError
    from router.faces import raise_file_limit

    raise_file_limit()
    try:
        uvloop.run(main)
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    except (StartError, ConfigError, OSError) as error:
        raise UserError(str(error)) from error
