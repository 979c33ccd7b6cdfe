"""Scenarios on a real model, against llama-server. Both are up all the time, and take turns."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from statistics import median

from benchmarks.baseline import best, best_choice
from benchmarks.jobs import Seen, percentile
from benchmarks.loads import DECODE, SHARED, Load, say, warm
from benchmarks.processes import running
from benchmarks.rows import Row
from benchmarks.systems import System, llama_server, roundhouse

ROUNDS = 3
DECODE_BARS = {1: 0.90, 8: 0.95, 32: 0.95}
PREFIX_BAR, CONTENDED_BAR = 3.5, 0.40
CONTENDED = Load("contended", 8, 16)
SEED = 100
SPIN = "import time\nend = time.monotonic() + 120\nwhile time.monotonic() < end: pass"


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


def compare(load: Load, bar: float, quick: bool) -> list[Row]:
    """One load on both systems, A B A B; each round has prompts of its own, so caches are cold.

    Both have the cache and the attention that were the fastest for them in a trial.
    """
    flags = best(load, quick)
    choice = best_choice(load)
    ours: list[Seen] = []
    theirs: list[Seen] = []
    with ExitStack() as stack:
        turns = (
            (stack.enter_context(roundhouse(*choice)), ours),
            (stack.enter_context(llama_server(flags)), theirs),
        )
        for number in range(1 if quick else ROUNDS):
            for system, runs in turns:
                warm(system, load.clients)
                runs.append(load.run(system, SEED + 10 * load.clients + number))
                say(f"  {system.name}: {runs[-1].rate:.1f} tokens/s, {latencies(runs[-1:])}")
    note = f"ours ({choice[-1]}): {latencies(ours)}; llama-server ({flags}): {latencies(theirs)}"
    return [Row.against(load.name, load.what, rate(ours), rate(theirs), bar, note=note)]


def decode(clients: int, quick: bool) -> list[Row]:
    """Short prompts, greedy, ``clients`` streams at once."""
    load = DECODE[clients]
    if quick:
        load = replace(load, requests=max(clients, load.requests // 2))
    return compare(load, DECODE_BARS[clients], quick)


def shared_prefix(quick: bool) -> list[Row]:
    """Clients whose prompts share a long prefix; a new prefix each round."""
    return compare(SHARED, PREFIX_BAR, quick)


def contended(quick: bool) -> list[Row]:
    """The same load alone, and beside a process that keeps one core busy."""
    return [
        contended_row(roundhouse(), CONTENDED_BAR, quick),
        contended_row(llama_server(best(DECODE[8], quick)), None, quick),
    ]


def contended_row(starting: AbstractContextManager[System], bar: float | None, quick: bool) -> Row:
    """The row of one system."""
    alone: list[Seen] = []
    beside: list[Seen] = []
    with starting as system:
        for number in range(1 if quick else ROUNDS):
            warm(system, CONTENDED.clients)
            alone.append(CONTENDED.run(system, SEED + 2000 + 2 * number))
            with running([sys.executable, "-c", SPIN]):
                beside.append(CONTENDED.run(system, SEED + 2001 + 2 * number))
            say(f"  {system.name}: {alone[-1].rate:.1f} alone, {beside[-1].rate:.1f} beside")
    what = f"{system.name}: beside one busy process / alone, c={CONTENDED.clients}"
    return Row.against("contended", what, rate(beside), rate(alone), bar)
