"""What draws cost beside a step of vLLM, by its own sampler and by the host's: CPU time.

``python -m benchmarks.vllm_sampler FOLDER [ROUNDS]``, with vLLM's interpreter; FOLDER is a model.
Both engines are loaded in turns, ROUNDS times, since vLLM has one per process. CPU time, of all
threads, is what other programs do not change.
"""

import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

from shards.engines import load
from shards.engines.base import Admit, EngineOptions, Plan, SamplingParams
from shards.engines.vllm_engine import VllmEngine

ROWS = (8, 32)
STEPS = 24
PROMPT_TOKENS = 16
SAMPLERS = ("vllm", "host")
KINDS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "top_p 0.95": SamplingParams(temperature=0.7, top_p=0.95),
    "top_k 40": SamplingParams(temperature=0.7, top_k=40),
    "top_k 40, top_p 0.95": SamplingParams(temperature=0.7, top_k=40, top_p=0.95),
    "penalty 1.1": SamplingParams(temperature=0.7, repetition_penalty=1.1),
}

Costs = dict[tuple[str, str, int], list[float]]


def measure(folder: Path, sampler: str, costs: Costs) -> None:
    """Adds the CPU time of a step's draws, in milliseconds, of all kinds and numbers of rows."""
    options = EngineOptions(
        folder,
        "m",
        kv_tokens=8192,
        sequences_max=max(ROWS),
        step_tokens_max=1024,
        threads=1,
        extra=(("eager", "1"), ("sampler", sampler)),
    )
    engine = load("vllm", options, lambda _fraction: None)
    assert isinstance(engine, VllmEngine)
    for rows in ROWS:
        for kind, sampling in KINDS.items():
            costs[sampler, kind, rows].append(_draw_ms(engine, rows, sampling))
    engine.close()


def _draw_ms(engine: VllmEngine, rows: int, sampling: SamplingParams) -> float:
    engine.reset()
    prompts = {n: [n * 7 + 11 * k for k in range(PROMPT_TOKENS)] for n in range(1, rows + 1)}
    admits = [Admit(n, prompt, PROMPT_TOKENS, sampling) for n, prompt in prompts.items()]
    engine.step(Plan(admits=admits, work=[(n, PROMPT_TOKENS) for n in prompts]))
    plan = Plan(work=[(n, 1) for n in prompts])
    spent: list[float] = []
    executor = engine._executor  # noqa: SLF001 - what else a step does hides what draws cost
    former = executor.sample_tokens

    def timed(masks: object) -> object:
        """All that follows the logits of a step, but for what is made of the result."""
        start = time.process_time()
        output = former(masks)
        spent.append(time.process_time() - start)
        return output

    executor.sample_tokens = timed
    for _ in range(STEPS):
        engine.step(plan)
    executor.sample_tokens = former
    return statistics.median(spent) * 1e3


def main() -> None:
    """Measures, and prints a table: what a draw costs above the argmax, for each sequence."""
    folder = Path(sys.argv[1])
    costs: Costs = defaultdict(list)
    for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 3):
        for sampler in SAMPLERS:
            measure(folder, sampler, costs)
    print(
        "| ms above greedy, per sequence |",
        " | ".join(f"{s}, {r} rows" for r in ROWS for s in SAMPLERS),
        "|",
    )
    for kind in list(KINDS)[1:]:
        cells = []
        for rows in ROWS:
            for sampler in SAMPLERS:
                pairs = zip(costs[sampler, kind, rows], costs[sampler, "greedy", rows], strict=True)
                cells.append(statistics.median((one - base) / rows for one, base in pairs))
        print(f"| {kind} |", " | ".join(f"{cell:.2f}" for cell in cells), "|")


if __name__ == "__main__":
    main()
