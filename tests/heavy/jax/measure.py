"""Tokens per second of the JAX engine alone, with SmolLM2 on this machine, which should be idle.

    python -m tests.heavy.jax.measure bfloat16

Decode with 1, 8 and 32 rows, prefill of 256 and 1,024 tokens, and decode of 16 rows that have 592
tokens in common, in shared pages and in pages of their own. One JSON object on standard output.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count

import numpy as np

from shards.engines import load
from shards.engines.base import Admit, Engine, EngineOptions, Plan, SamplingParams
from tests.heavy.models import smollm2_folder

STEP = 256
RANDOM = np.random.default_rng(0)


def tokens(length: int) -> list[int]:
    drawn: list[int] = RANDOM.integers(10, 49000, length).tolist()
    return drawn


def prefill(engine: Engine, number: int, prompt: Sequence[int]) -> None:
    admits = [Admit(number, prompt, len(prompt), SamplingParams())]
    for start in range(0, len(prompt), STEP):
        work = [(number, min(STEP, len(prompt) - start))]
        engine.step(Plan(admits=admits if not start else [], work=work))


def seconds(call: Callable[[], object], times: int) -> float:
    """The median of several calls."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def decode(engine: Engine, rows: Sequence[int], times: int = 16) -> float:
    """Tokens per second of sequences that are resident."""
    plan = Plan(work=[(row, 1) for row in rows])
    engine.step(plan)
    return len(rows) / seconds(lambda: engine.step(plan), times)


def _prefill_next(engine: Engine, numbers: Iterator[int], length: int) -> None:
    prefill(engine, next(numbers), tokens(length))


def measure(engine: Engine) -> dict[str, float]:
    found = {}
    for many in (1, 8, 32):
        engine.reset()
        rows = range(1, many + 1)
        for row in rows:
            prefill(engine, row, tokens(32))
        found[f"decode, {many} rows"] = decode(engine, rows)
    for length in (256, 1024):
        engine.reset()
        taken = seconds(partial(_prefill_next, engine, count(1), length), 4)
        found[f"prefill of {length}"] = length / taken
    prefix = tokens(592)
    for shared in (True, False):
        engine.reset()
        prefill(engine, 1, prefix)
        for row in range(2, 18):
            prompt = prefix + tokens(24)
            if shared:
                made = Admit(row, prompt, len(prompt), SamplingParams(), 1, len(prefix))
                engine.step(Plan(admits=[made], work=[(row, 24)]))
            else:
                prefill(engine, row, prompt)
        kind = "shared" if shared else "not shared"
        found[f"decode, 16 rows of 616 tokens, 592 {kind}"] = decode(engine, range(2, 18), 10)
    return found


def main() -> int:
    dtype = sys.argv[1] if len(sys.argv) > 1 else "bfloat16"
    options = EngineOptions(
        smollm2_folder(),
        "smollm2",
        kv_tokens=16384,
        sequences_max=32,
        step_tokens_max=STEP,
        dtype=dtype,
        device="cpu",
    )
    began = time.perf_counter()
    engine = load("jax", options, lambda _fraction: None)
    found = {"load, seconds": time.perf_counter() - began, **measure(engine)}
    rounded = {name: round(value, 1) for name, value in found.items()}
    sys.stdout.write(json.dumps({"dtype": dtype, "tokens_per_second": rounded}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
