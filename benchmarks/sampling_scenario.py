"""What share of a step the sampler takes, with 32 sequences on llama.cpp.

``python -m benchmarks.sampling_scenario`` is the process that measures; JSON out. One engine thread
samples while the other compute threads wait, so the share is one of wall time.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from tokenizers import Tokenizer

from benchmarks.jobs import LoadError
from benchmarks.prompts import distinct
from benchmarks.rows import Row
from benchmarks.systems import model_path
from shards.engines import load
from shards.engines.base import Admit, Engine, EngineOptions, Plan, SamplingParams
from shards.sampling import Drawn, Sampler

SHARE_BAR = 0.05
SEQUENCES, PROMPT, STEPS = 32, 32, 24
ABOUT = ("history of Rome", "water cycle", "violin", "steam engine", "planet Mars", "human heart")
ABOUT += ("potato", "alphabet")
TEXTS = (
    "<|im_start|>user\nExplain the {} to a child.<|im_end|>\n<|im_start|>assistant\n",
    "The {} is one of the most important subjects because",
    "Once upon a time there was a teacher who talked about the {} every day, and",
    "Here are three facts about the {}:\n1.",
)
NUCLEUS = "temperature 1, top_p 0.95"
KINDS = {
    "greedy": SamplingParams(),
    "temperature 1": SamplingParams(temperature=1.0),
    NUCLEUS: SamplingParams(temperature=1.0, top_p=0.95),
    "temperature 0.8, top_k 40, top_p 0.95, min_p 0.05": SamplingParams(
        temperature=0.8, top_k=40, top_p=0.95, min_p=0.05
    ),
    "temperature 1, three penalties, top_p 0.95, 5 log probabilities": SamplingParams(
        temperature=1.0,
        top_p=0.95,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=0.1,
        logprobs=True,
        top_logprobs=5,
    ),
}


@dataclass(slots=True)
class Clock:
    """Time spent in the sampler since the last step began, in seconds."""

    spent_s: float = 0.0


@contextmanager
def clocked() -> Iterator[Clock]:
    """Every sampler's draws are timed for the length of a block."""
    clock, draw = Clock(), Sampler.draw

    def timed(self: Sampler, *given: Any) -> Drawn:
        began = perf_counter()
        try:
            return draw(self, *given)
        finally:
            clock.spent_s += perf_counter() - began

    setattr(Sampler, "draw", timed)  # noqa: B010 - the benchmark's own process
    try:
        yield clock
    finally:
        setattr(Sampler, "draw", draw)  # noqa: B010


def engine() -> Engine:
    """llama.cpp with the embedded model and room for all sequences."""
    options = EngineOptions(
        model_path(), "embedded", kv_tokens=8192, sequences_max=SEQUENCES, step_tokens_max=512
    )
    return load("llamacpp", options, lambda _fraction: None)


def texts(files: dict[str, bytes]) -> list[list[int]]:
    """Prompts as people write them, after which a model has opinions."""
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    return [tokenizer.encode(text.format(about)).ids for about in ABOUT for text in TEXTS]


def shares(
    run: Callable[[Plan], object],
    clock: Clock,
    params: SamplingParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[float, float]:
    """The sampler's time and the whole of a decode step in seconds, medians over the steps."""
    for number, prompt in enumerate(prompts, start=1):
        admit = Admit(number, list(prompt), len(prompt), params)
        run(Plan(admits=[admit], work=[(number, len(prompt))]))
    sampler, step = [], []
    for _ in range(STEPS):
        clock.spent_s, began = 0.0, perf_counter()
        run(Plan(work=[(number, 1) for number in range(1, len(prompts) + 1)]))
        step.append(perf_counter() - began)
        sampler.append(clock.spent_s)
    return median(sampler), median(step)


def sampling(_quick: bool) -> list[Row]:
    """The share of each kind of sampling, quick or not."""
    command = [sys.executable, "-m", "benchmarks.sampling_scenario"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise LoadError(f"the engine's process ended with {done.returncode}: {done.stderr[-1000:]}")
    rows = []
    for kind, (spent_s, step_s) in json.loads(done.stdout.splitlines()[-1]).items():
        note = f"{spent_s * 1e3:.1f} ms of {step_s * 1e3:.0f}"
        what = f"sampling, of a step of {SEQUENCES} sequences: {kind}"
        share = spent_s / step_s * 100
        rows.append(Row.at_most("sampling", what, share, SHARE_BAR * 100, unit="%", note=note))
    return rows


def main() -> None:
    """Measures in this process and prints the times by kind."""
    measured = {}
    running = engine()
    natural = texts(running.tokenizer_files())
    with clocked() as clock:
        for kind, params in KINDS.items():
            running.reset()
            measured[kind] = shares(running.step, clock, params, natural)
        running.reset()
        # After words at random nearly all tokens are about as likely: the most work for top_p.
        words = distinct(SEQUENCES, PROMPT, 7300)
        flat = shares(running.step, clock, KINDS[NUCLEUS], words)
        measured[f"{NUCLEUS}, after random words"] = flat
    running.close()
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
