"""A line for whoever waits longer than expected."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

# What is done sooner says nothing in between.
QUIET_S = 2.0


@contextmanager
def patience(text: str) -> Iterator[None]:
    """Says a line on standard error if what follows takes long."""
    timer = threading.Timer(QUIET_S, lambda: click.echo(text, err=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
