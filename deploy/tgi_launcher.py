"""Where ``text-generation-launcher`` begins, as ``cli`` does."""

from shards.interrupts import end_quietly


def main() -> None:
    """Entry point."""
    end_quietly()
    from deploy.running import run_command
    from deploy.tgi_command import NAME, command

    run_command(command, NAME)


if __name__ == "__main__":
    main()
