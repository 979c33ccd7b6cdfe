"""Looks for llama-server's best flags: ``python -m benchmarks tune``. See ``LLAMA_FLAGS``."""

from collections.abc import Iterator

from benchmarks.engine_scenarios import (
    NEW,
    PREFIX,
    PROMPT,
    SHARED_CLIENTS,
    SHARED_NEW,
    SHARED_REQUESTS,
    say,
    warm,
)
from benchmarks.jobs import Seen, percentile
from benchmarks.prompts import distinct, sharing
from benchmarks.rows import Row
from benchmarks.systems import System, completion, llama_server

SLOTS = ("-np", "32")
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "unified, flash attention": ((*SLOTS, "-kvu", "-fa", "on", "-t", "2"), "openmp"),
    "the same, ggml's thread pool": ((*SLOTS, "-kvu", "-fa", "on", "-t", "2"), "pool"),
    "unified, no flash attention": ((*SLOTS, "-kvu", "-fa", "off", "-t", "2"), "openmp"),
    "not unified, flash attention": ((*SLOTS, "-no-kvu", "-fa", "on", "-t", "2"), "openmp"),
    "not unified, no flash attention": ((*SLOTS, "-no-kvu", "-fa", "off", "-t", "2"), "openmp"),
    "unified, no cache of idle slots": (
        (*SLOTS, "-kvu", "-fa", "on", "-t", "2", "-cram", "0"),
        "openmp",
    ),
    "unified, one thread": ((*SLOTS, "-kvu", "-fa", "on", "-t", "1"), "openmp"),
    "unified, 16 slots": (("-np", "16", "-kvu", "-fa", "on", "-t", "2"), "openmp"),
}
CLIENTS = (1, 8, 32)
ROUNDS = 2


def tune(quick: bool) -> list[Row]:
    """Tokens per second of each set of flags in each of our scenarios: the best of all rounds.

    The best, because whatever else the machine does only ever takes something away.
    """
    best: dict[tuple[str, str], Seen] = {}
    for number in range(1 if quick else ROUNDS):
        for name, (flags, build) in KINDS.items():
            with llama_server(flags, build) as system:
                warm(system, 32)
                for what, seen in _loads(system, number):
                    say(f"  {name}: {what} {seen.rate:.1f} tokens/s")
                    known = best.get((name, what))
                    if known is None or seen.rate > known.rate:
                        best[name, what] = seen
    return [_row(name, what, seen) for (name, what), seen in best.items()]


def _loads(system: System, number: int) -> Iterator[tuple[str, Seen]]:
    """The scenarios, short, and what came of each."""
    for clients in CLIENTS:
        prompts = distinct(max(4, clients), PROMPT, 9000 + 100 * number + clients)
        bodies = [completion(prompt, NEW) for prompt in prompts]
        yield f"c={clients}", system.load(bodies, clients, NEW).raise_errors()
    prompts = sharing(SHARED_REQUESTS, PREFIX, PROMPT, 9500 + 2 * number)
    bodies = [completion(prompt, SHARED_NEW) for prompt in prompts]
    yield "shared prefix", system.load(bodies, SHARED_CLIENTS, SHARED_NEW).raise_errors()


def _row(name: str, what: str, seen: Seen) -> Row:
    first = percentile(seen.first_s, 50)
    note = f"first token p50 {first:.2f} s, {seen.cached_tokens} prompt tokens found cached"
    return Row.fact("tune", f"{name}: {what}", seen.rate, unit="tokens/s", note=note)
