"""``python -m router``: a router for workers that run elsewhere. ``roundhouse router`` can more."""

import tls.before_grpc  # noqa: F401 - before what imports grpc

# isort: split
import argparse
import sys
from typing import Any

import uvloop

from router.app import serve
from router.config import ConfigError
from router.faces import raise_file_limit
from router.options import DEFAULTS, KNOBS, Knob, number, settings_from
from router.remote_workers import remote_group


def main() -> int:
    """Returns the exit status; what the user can mend is one line on standard error."""
    given = vars(_parser().parse_args())
    groups = [remote_group(*numbered) for numbered in enumerate(given.pop("worker"))]
    try:
        settings = settings_from(given)
        raise_file_limit()
        uvloop.run(serve(settings, groups, _tell))
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    """The options of ``roundhouse router``, without their variables."""
    parser = argparse.ArgumentParser(
        prog="python -m router", description="A router for workers elsewhere."
    )
    parser.add_argument(
        "--worker",
        action="append",
        required=True,
        metavar="ADDR[,ADDR...]",
        help="unix:///path or host:port; the ranks of one group joined by commas; repeatable",
    )
    headings = dict.fromkeys(knob.section for knob in KNOBS)
    blocks = {heading: parser.add_argument_group(heading) for heading in headings}
    for knob in KNOBS:
        blocks[knob.section].add_argument(
            f"--{knob.name}", dest=knob.setting, help=knob.help, **_shape(knob)
        )
    return parser


def _shape(knob: Knob) -> dict[str, Any]:
    """What kind of option it is, by the default of its setting."""
    default = DEFAULTS[knob.setting]
    shape: dict[str, Any] = {"default": default}
    match default:
        case bool():
            return shape | {"action": argparse.BooleanOptionalAction}
        case tuple():
            return shape | {"metavar": knob.metavar, "action": "append", "default": []}
        case str():
            return shape | {"metavar": knob.metavar}
        case _:
            return shape | {"metavar": knob.metavar, "type": str if knob.text else number}


def _tell(port: int, grpc_port: int) -> None:
    sys.stderr.write(f"ready: REST on port {port}, gRPC on port {grpc_port}\n")


if __name__ == "__main__":
    sys.exit(main())
