"""Scenarios on a real model, against llama-server. Both are up all the time, and take turns."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from statistics import median
from time import monotonic

from benchmarks.jobs import Seen, percentile
from benchmarks.processes import running
from benchmarks.prompts import distinct, sharing
from benchmarks.rows import Row
from benchmarks.systems import System, completion, llama_server, roundhouse

PROMPT, NEW = 32, 64
PREFIX, SHARED_NEW, SHARED_CLIENTS, SHARED_REQUESTS = 600, 32, 16, 32
ROUNDS = 3
# Clients: requests in one round, and the bar.
DECODE = {1: (8, 0.90), 8: (24, 0.95), 32: (64, 0.95)}
PREFIX_BAR, CONTENDED_BAR = 3.5, 0.40
CONTENDED_CLIENTS, CONTENDED_REQUESTS = 8, 16
WARM_SEED, SEED = 1, 100
WARM_S, WARM_NEW = 2.0, 24
SPIN = "import sys, time\nend = time.monotonic() + 120\nwhile time.monotonic() < end: pass"


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def take_turns(
    systems: Sequence[System],
    rounds: int,
    clients: int,
    measure: Callable[[System, int], Seen],
) -> dict[str, list[Seen]]:
    """Measures the systems one after the other, ``rounds`` times: A B A B."""
    seen: dict[str, list[Seen]] = {system.name: [] for system in systems}
    for number in range(rounds):
        for system in systems:
            warm(system, clients)
            one = measure(system, number).raise_errors()
            first = percentile(one.first_s, 50)
            say(f"  {system.name}: {one.rate:.1f} tokens/s, first token p50 {first * 1e3:.0f} ms")
            seen[system.name].append(one)
    return seen


def both() -> list[AbstractContextManager[System]]:
    """Roundhouse and the baseline, on the embedded model."""
    return [roundhouse(), llama_server()]


def warm(system: System, clients: int) -> None:
    """A load of at least two seconds that is not counted.

    It precedes every turn: what the other system did meanwhile must not count, neither in caches
    nor in our engine's count of threads, which follows what else the machine does.
    """
    until = monotonic() + WARM_S
    while monotonic() < until:
        prompts = distinct(max(2, clients), PROMPT, WARM_SEED)
        system.load(
            [completion(one, WARM_NEW) for one in prompts], clients, WARM_NEW
        ).raise_errors()


def rate(runs: Sequence[Seen]) -> float:
    """Median of the runs' tokens per second."""
    return median(run.rate for run in runs)


def latencies(runs: Sequence[Seen]) -> str:
    """First-token and gap medians over all runs, for the notes."""
    first = percentile([value for run in runs for value in run.first_s], 50)
    gaps = [value for run in runs for value in run.gaps_s]
    return (
        f"first token p50 {first * 1e3:.0f} ms, "
        f"gap p50 {percentile(gaps, 50) * 1e3:.0f} and p99 {percentile(gaps, 99) * 1e3:.0f} ms"
    )


def compare(scenario: str, what: str, seen: dict[str, list[Seen]], bar: float | None) -> Row:
    """The row of a scenario in which the two systems took turns."""
    ours, theirs = seen["roundhouse"], seen["llama-server"]
    note = f"ours: {latencies(ours)}; llama-server: {latencies(theirs)}"
    return Row.against(scenario, what, rate(ours), rate(theirs), bar, note=note)


def decode(clients: int, quick: bool) -> list[Row]:
    """Short prompts, greedy, ``clients`` streams at once."""
    requests, bar = DECODE[clients]
    requests = max(clients, requests // 2) if quick else requests

    def measure(system: System, number: int) -> Seen:
        prompts = distinct(requests, PROMPT, SEED + 10 * clients + number)
        return system.load([completion(prompt, NEW) for prompt in prompts], clients, NEW)

    with ExitStack() as stack:
        systems = [stack.enter_context(system) for system in both()]
        seen = take_turns(systems, 1 if quick else ROUNDS, clients, measure)
    what = f"{PROMPT} prompt + {NEW} new tokens, c={clients}, REST streaming"
    return [compare(f"decode_c{clients}", what, seen, bar)]


def shared_prefix(quick: bool) -> list[Row]:
    """Clients whose prompts share a long prefix; a new prefix each round, so caches are cold."""

    def measure(system: System, number: int) -> Seen:
        prompts = sharing(SHARED_REQUESTS, PREFIX, PROMPT, SEED + 1000 + 2 * number)
        bodies = [completion(prompt, SHARED_NEW) for prompt in prompts]
        return system.load(bodies, SHARED_CLIENTS, SHARED_NEW)

    with ExitStack() as stack:
        systems = [stack.enter_context(system) for system in both()]
        seen = take_turns(systems, 1 if quick else ROUNDS, SHARED_CLIENTS, measure)
    what = (
        f"{SHARED_REQUESTS} requests of {SHARED_CLIENTS} clients sharing a {PREFIX}-token prefix, "
        f"{PROMPT} prompt + {SHARED_NEW} new tokens"
    )
    return [compare("shared_prefix", what, seen, PREFIX_BAR)]


def contended(quick: bool) -> list[Row]:
    """The same load alone, and beside a process that keeps one core busy."""
    return [
        contended_row(roundhouse(), CONTENDED_BAR, quick),
        contended_row(llama_server(), None, quick),
    ]


def contended_row(starting: AbstractContextManager[System], bar: float | None, quick: bool) -> Row:
    """The row of one system."""
    clients, alone, beside = CONTENDED_CLIENTS, [], []

    def measure(seed: int) -> Seen:
        bodies = [completion(one, NEW) for one in distinct(CONTENDED_REQUESTS, PROMPT, seed)]
        return system.load(bodies, clients, NEW).raise_errors()

    with starting as system:
        warm(system, clients)
        for number in range(1 if quick else ROUNDS):
            alone.append(measure(SEED + 2000 + 2 * number))
            with running([sys.executable, "-c", SPIN]):
                beside.append(measure(SEED + 2001 + 2 * number))
            say(f"  {system.name}: {alone[-1].rate:.1f} alone, {beside[-1].rate:.1f} beside")
    what = f"{system.name}: beside one busy process / alone, c={clients}"
    return Row.against("contended", what, rate(beside), rate(alone), bar)
