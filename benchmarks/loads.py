"""The loads on a real model, as both systems get them."""

import sys
from dataclasses import dataclass
from time import monotonic

from benchmarks.jobs import Seen
from benchmarks.prompts import distinct, sharing
from benchmarks.systems import System, completion

PROMPT, NEW = 32, 64
PREFIX, SHARED_NEW, SHARED_CLIENTS, SHARED_REQUESTS = 600, 32, 16, 32
WARM_SEED, WARM_S, WARM_NEW = 1, 2.0, 24


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop of ``clients`` with ``requests`` in all; a shared prefix or none."""

    name: str
    clients: int
    requests: int
    prefix: int = 0

    @property
    def what(self) -> str:
        """The load in words."""
        if self.prefix:
            return (
                f"{self.requests} requests of {self.clients} clients sharing a "
                f"{self.prefix}-token prefix, {PROMPT} prompt + {SHARED_NEW} new tokens"
            )
        return f"{PROMPT} prompt + {NEW} new tokens, c={self.clients}, REST streaming"

    def run(self, system: System, seed: int) -> Seen:
        """Runs the load; other seeds have other prompts. Raises ``LoadError`` on any error."""
        if self.prefix:
            prompts = sharing(self.requests, self.prefix, PROMPT, 2 * seed)
            new = SHARED_NEW
        else:
            prompts = distinct(self.requests, PROMPT, seed)
            new = NEW
        bodies = [completion(prompt, new) for prompt in prompts]
        return system.load(bodies, self.clients, new).raise_errors()


DECODE = {
    1: Load("decode_c1", 1, 8),
    8: Load("decode_c8", 8, 24),
    32: Load("decode_c32", 32, 64),
}
SHARED = Load("shared_prefix", SHARED_CLIENTS, SHARED_REQUESTS, PREFIX)


def warm(system: System, clients: int) -> None:
    """A load of at least two seconds that is not counted.

    It precedes every turn: what the other system did meanwhile must not count, neither in caches
    nor in our engine's count of threads, which follows what else the machine does.
    """
    until = monotonic() + WARM_S
    while monotonic() < until:
        prompts = distinct(max(2, clients), PROMPT, WARM_SEED)
        bodies = [completion(one, WARM_NEW) for one in prompts]
        system.load(bodies, clients, WARM_NEW).raise_errors()
