"""Roundhouse with vLLM inside against ``vllm serve``: the same kernels, another scheduler.

Both are up all the time, and take turns. ``vllm serve`` runs in its default configuration, which
keeps a core free for its front end, or with its threads on all cores, whichever is faster here.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache

from benchmarks.engine_scenarios import ROUNDS, SEED, latencies, rate
from benchmarks.jobs import Seen
from benchmarks.loads import DECODE, SHARED, Load, say, warm
from benchmarks.rows import Row
from benchmarks.vllm_systems import cores, roundhouse_vllm, vllm_serve

BAR, PREFIX_BAR = 1.0, 1.0
TRIAL_SEED = 9100


@cache
def best_threads(load: Load) -> str:
    """How ``vllm serve`` is faster under a load: "" for its default, or the cores to bind to."""
    rates = {}
    for threads in ("", cores()):
        with vllm_serve(threads) as system:
            warm(system, load.clients)
            rates[threads] = load.run(system, TRIAL_SEED).rate
            say(f"  {system.name}: {rates[threads]:.1f} tokens/s")
    return max(rates, key=rates.__getitem__)


def compare(load: Load, bar: float, quick: bool) -> list[Row]:
    """One load on both systems, A B A B; each round has prompts of its own, so caches are cold."""
    threads = best_threads(load)
    ours: list[Seen] = []
    theirs: list[Seen] = []
    with ExitStack() as stack:
        turns = (
            (stack.enter_context(roundhouse_vllm()), ours),
            (stack.enter_context(vllm_serve(threads)), theirs),
        )
        for number in range(1 if quick else ROUNDS):
            for system, runs in turns:
                warm(system, load.clients)
                runs.append(load.run(system, SEED + 10 * load.clients + number))
                say(f"  {system.name}: {runs[-1].rate:.1f} tokens/s, {latencies(runs[-1:])}")
    bound = f"threads on cores {threads}" if threads else "default threads"
    note = f"ours: {latencies(ours)}; vllm serve ({bound}): {latencies(theirs)}"
    name = f"vllm_{'prefix' if load.prefix else f'c{load.clients}'}"
    return [Row.against(name, load.what, rate(ours), rate(theirs), bar, note=note)]


def decode(clients: int, quick: bool) -> list[Row]:
    """Short prompts, greedy, ``clients`` streams at once."""
    load = DECODE[clients]
    if quick:
        load = replace(load, requests=max(clients, load.requests // 2))
    return compare(load, BAR, quick)


def shared_prefix(quick: bool) -> list[Row]:
    """Clients whose prompts share a long prefix; a new prefix each round."""
    return compare(SHARED, PREFIX_BAR, quick)
