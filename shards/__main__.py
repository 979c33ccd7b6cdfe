"""``python -m shards``: one worker; see ``process``."""

import sys

from shards.interrupts import end_quietly


def main() -> int:
    """Runs the worker; returns the exit code."""
    end_quietly()
    import tls.before_grpc  # noqa: F401 - before what imports grpc
    from shards.process import main as run

    try:
        return run()
    finally:
        end_quietly()


if __name__ == "__main__":
    sys.exit(main())
