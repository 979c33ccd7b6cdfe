"""Roundhouse with an engine of an environment of its own inside, against ``vllm serve``.

With vLLM inside these are the same kernels and another scheduler; torch and JAX have their own. All
are up all the time, and take turns. ``vllm serve`` runs in its default configuration, which keeps a
core free for its front end, or with its threads on all cores, whichever is faster here.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache

from benchmarks.engine_scenarios import ROUNDS, SEED, latencies, rate
from benchmarks.jobs import Seen
from benchmarks.loads import DECODE, SHARED, Load, say, warm
from benchmarks.rows import Row
from benchmarks.vllm_systems import cores, roundhouse_with, vllm_serve

# The engines that are compared, and what each has to reach.
Bars = dict[str, float | None]
DECODE_BARS: dict[int, Bars] = {
    8: {"vllm": 1.0, "torch": None, "jax": None},
    32: {"vllm": 1.0, "torch": 1.2, "jax": None},
}
PREFIX_BARS: Bars = {"vllm": 1.0, "torch": 1.5, "jax": 1.5}
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


def compare(load: Load, bars: Bars, quick: bool) -> list[Row]:
    """One load on all systems in turns; each round has prompts of its own, so caches are cold."""
    threads = best_threads(load)
    ours: dict[str, list[Seen]] = {engine: [] for engine in bars}
    theirs: list[Seen] = []
    with ExitStack() as stack:
        turns = [
            *((stack.enter_context(roundhouse_with(engine)), ours[engine]) for engine in bars),
            (stack.enter_context(vllm_serve(threads)), theirs),
        ]
        for number in range(1 if quick else ROUNDS):
            for system, runs in turns:
                warm(system, load.clients)
                runs.append(load.run(system, SEED + 10 * load.clients + number))
                say(f"  {system.name}: {runs[-1].rate:.1f} tokens/s, {latencies(runs[-1:])}")
    bound = f"threads on cores {threads}" if threads else "default threads"
    name = f"vllm_{'prefix' if load.prefix else f'c{load.clients}'}"
    rows = []
    for engine, bar in bars.items():
        note = f"ours: {latencies(ours[engine])}; vllm serve ({bound}): {latencies(theirs)}"
        what = f"{engine} inside, beside vllm serve: {load.what}"
        rows.append(Row.against(name, what, rate(ours[engine]), rate(theirs), bar, note=note))
    return rows


def decode(clients: int, quick: bool) -> list[Row]:
    """Short prompts, greedy, ``clients`` streams at once."""
    load = DECODE[clients]
    if quick:
        load = replace(load, requests=max(clients, load.requests // 2))
    return compare(load, DECODE_BARS[clients], quick)


def shared_prefix(quick: bool) -> list[Row]:
    """Clients whose prompts share a long prefix; a new prefix each round."""
    return compare(SHARED, PREFIX_BARS, quick)
