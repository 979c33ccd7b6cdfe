"""llama-server at its best flags, found anew for each load: which are best depends on the CPU.

On one CPU a unified KV cache is twice as fast as a split one, on another, with AMX, it is slower.
So each scenario first tries these, and the baseline is the fastest. Our own server has such
choices, too, and is tried with them in the same way, as `roundhouse tune` would.
"""

from dataclasses import replace
from functools import cache

from benchmarks.loads import DECODE, SHARED, Load, say, warm
from benchmarks.rows import Row
from benchmarks.systems import LlamaFlags, llama_server, roundhouse

LAYOUTS = (
    LlamaFlags(slots=32, unified=True, flash_attention=True),
    LlamaFlags(slots=32, unified=False, flash_attention=True),
    LlamaFlags(slots=32, unified=False, flash_attention=False),
    LlamaFlags(slots=32, unified=True, flash_attention=False),
    LlamaFlags(slots=16, unified=True, flash_attention=True),
    LlamaFlags(slots=16, unified=False, flash_attention=True),
)
QUICK_LAYOUTS = 2
OUR_CHOICES = tuple(
    ("--engine-option", option) for option in ("kv=unified", "kv=split", "flash=off")
)
SEED = 9000


@cache
def tried(load: Load, quick: bool) -> dict[LlamaFlags, float]:
    """Tokens per second of each set of flags under a load, one round each.

    The fastest layout is tried with the other build as well.
    """
    rates: dict[LlamaFlags, float] = {}
    for flags in LAYOUTS[:QUICK_LAYOUTS] if quick else LAYOUTS:
        rates[flags] = rate(flags, load)
    fastest = max(rates, key=rates.__getitem__)
    if not quick:
        other = replace(fastest, build="openmp")
        rates[other] = rate(other, load)
    return rates


def best(load: Load, quick: bool) -> LlamaFlags:
    """The fastest flags for this load."""
    rates = tried(load, quick)
    return max(rates, key=rates.__getitem__)


def rate(flags: LlamaFlags, load: Load) -> float:
    """Tokens per second of one round with these flags."""
    with llama_server(flags) as system:
        warm(system, load.clients)
        seen = _short(load).run(system, SEED)
    say(f"  llama-server, {flags}: {load.name} {seen.rate:.1f} tokens/s")
    return seen.rate


@cache
def best_choice(load: Load) -> tuple[str, ...]:
    """Options of our own server: the fastest for this load, in one round each."""
    rates: dict[tuple[str, ...], float] = {}
    for choice in OUR_CHOICES:
        with roundhouse(*choice) as system:
            warm(system, load.clients)
            rates[choice] = _short(load).run(system, SEED).rate
        say(f"  roundhouse, {choice[-1]}: {load.name} {rates[choice]:.1f} tokens/s")
    return max(rates, key=rates.__getitem__)


def _short(load: Load) -> Load:
    """The load, with no more requests than there are clients; a prefix needs all to be shared."""
    return load if load.prefix else replace(load, requests=min(load.requests, max(4, load.clients)))


def tune(quick: bool) -> list[Row]:
    """All that was tried, for every load."""
    return [
        Row.fact("tune", f"llama-server, {flags}: {load.name}", speed, unit="tokens/s")
        for load in (*DECODE.values(), SHARED)
        for flags, speed in tried(load, quick).items()
    ]
