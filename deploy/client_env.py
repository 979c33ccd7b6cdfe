"""Environments of the clients that the project's tests run, apart from the project's own.

``python -m deploy.client_env NAME...`` makes ``<home>/<NAME>`` with what the extra of that name in
``pyproject.toml`` says and what running tests takes. Roundhouse itself is not in it: clients know
a server by its ports alone. The second call is instant, see ``deploy/environment.py``.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence

from deploy.declared import Declared, declared
from deploy.engine_env import TEST, base_version, locked, prepare
from deploy.environment import Environment, SetupError, StepFailed, run, say, status_of
from deploy.interpreters import home

PREFIX = "clients"
# Packages that come without what they depend on: of vLLM's adapter for TGIS the tests use the
# generated stub alone, and not the server that it is.
ALONE = {"clients": ("vllm-tgis-adapter==0.10.0",)}


def needs(project: Declared, extra: str) -> tuple[str, ...]:
    """The requirements of an environment. Raises ``SetupError``."""
    names = sorted(name for name in project.extras if name.startswith(PREFIX))
    if extra not in names:
        raise SetupError(f"no clients are called {extra}; there is {', '.join(names) or 'none'}")
    return (*project.extras[extra], *project.extras.get(TEST, ()))


def install(extra: str, *, python: str = sys.executable) -> None:
    """Makes or completes an environment; instant if it is up to date. Raises ``SetupError``."""
    wanted, alone = needs(declared(), extra), ALONE.get(extra, ())
    folder = home() / extra
    with locked(folder):
        version = base_version(python)
        facts = json.dumps([version, *wanted, *alone])
        digest = hashlib.sha256(facts.encode()).hexdigest()
        venv = Environment(folder, folder.parent, python)
        if venv.has([extra], digest):
            return
        began = time.monotonic()
        prepare(venv, version)
        try:
            run([venv.pip(f"installing {extra}", "install", *wanted)])
            if alone:
                run([venv.pip("installing stubs", "install", "--no-deps", *alone)])
        except StepFailed as failed:
            raise SetupError(failed.one_line()) from failed
        venv.write_stamp([extra], digest)
    say(f"{extra} is ready after {int(time.monotonic() - began)} s, in {folder}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the project's own verbs. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="+", metavar="NAME")
    given = parser.parse_args(arguments)

    def work() -> None:
        for extra in given.extras:
            install(extra)

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
