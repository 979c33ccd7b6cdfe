"""How the commands that serve are run to their end."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from deploy.options import UserError
from router.config import ConfigError


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs until served out; what the user can mend becomes one line."""
    import uvloop

    from deploy.supervisor import StartError

    try:
        uvloop.run(main)
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    except (StartError, ConfigError, OSError) as error:
        raise UserError(str(error)) from error
