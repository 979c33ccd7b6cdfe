"""Where the ``roundhouse`` command begins: what takes time is imported behind ``end_quietly``."""

from shards.interrupts import end_quietly


def main() -> None:
    """Entry point."""
    end_quietly()
    from deploy.commands import cli
    from deploy.running import run_command

    run_command(cli, "roundhouse")


if __name__ == "__main__":
    main()
