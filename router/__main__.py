"""``python -m router``: a router for workers that run elsewhere. ``roundhouse router`` can more."""

import argparse
import sys

import uvloop

from router.app import serve
from router.config import ConfigError, GroupSpec, Settings
from router.faces import raise_file_limit


def main() -> int:
    """Returns the exit status; what the user can mend is one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m router", description=__doc__)
    parser.add_argument(
        "--worker",
        action="append",
        required=True,
        metavar="ADDR[,ADDR...]",
        help="unix:///path or host:port; the ranks of one group joined by commas; repeatable",
    )
    parser.add_argument("--host", default=Settings().host)
    parser.add_argument("--port", type=int, default=Settings().port, help="port of REST")
    parser.add_argument("--grpc-port", type=int, default=Settings().grpc_port)
    parser.add_argument("--json-output", action="store_true", help="log lines as JSON objects")
    given = parser.parse_args()
    groups = [
        GroupSpec(f"group-{number}", None, tuple(ranks.split(",")))
        for number, ranks in enumerate(given.worker)
    ]
    try:
        settings = Settings(
            host=given.host,
            port=given.port,
            grpc_port=given.grpc_port,
            json_output=given.json_output,
        )
        raise_file_limit()
        uvloop.run(serve(settings, groups, _tell))
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _tell(port: int, grpc_port: int) -> None:
    sys.stderr.write(f"ready: REST on port {port}, gRPC on port {grpc_port}\n")


if __name__ == "__main__":
    sys.exit(main())
