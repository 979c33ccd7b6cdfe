"""The configuration that ``roundhouse tune`` picks, against llama-server and ``vllm serve``.

``tune`` may choose among all engines that are here, with the model as a folder of safetensors and
as the GGUF file that llama-server has. Then the three systems are up together and take turns; the
baseline is the better of the other two, each in the configuration that is fastest here.

What ``tune`` has measured is kept in ``benchmarks/out``: a further run begins with the turns.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.baseline import best
from benchmarks.engine_scenarios import ROUNDS, SEED, latencies, rate
from benchmarks.jobs import Seen
from benchmarks.loads import DECODE, NEW, PROMPT, say, warm
from benchmarks.processes import StartError
from benchmarks.report import PLOT
from benchmarks.rows import Row
from benchmarks.systems import System, llama_server, model_path, roundhouse
from benchmarks.vllm_scenarios import best_threads
from benchmarks.vllm_systems import EAGER, vllm_serve
from deploy.engines import installed_here
from tests.heavy.models import smollm2_folder

BAR = 1.3
MINUTES, QUICK_MINUTES = 20.0, 6.0
# A search that is over time ends by itself; loading and leaving come on top.
SPARE_S = 120.0
ENGINES = ("llamacpp", "torch", "jax", "vllm")
# vLLM's compilation takes minutes; where it is left out, vllm serve does without it, too.
EAGER_TRIES = (
    "engine-option=eager=1",
    f"engine-option=eager=1,threads={len(os.sched_getaffinity(0))}",
)
CHOSEN = "# Chosen by 'roundhouse tune': "


def picked(clients: int, quick: bool) -> Path:
    """The config file of the winner for this load. Raises ``StartError`` if there is none."""
    minutes = QUICK_MINUTES if quick else MINUTES
    output = PLOT.with_name(f"tuned_c{clients}.toml")
    output.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "deploy.cli", "tune", str(smollm2_folder()), str(model_path())]
    command += ["--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW)]
    command += ["--concurrency", str(clients), "--minutes", str(minutes), "--output", str(output)]
    here = installed_here()
    for engine in filter(here.__contains__, ENGINES):
        if EAGER and engine == "vllm":
            command += [word for one in EAGER_TRIES for word in ("--try", f"vllm,{one}")]
        else:
            command += ["--engine", engine]
    ended = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        timeout=minutes * 60 + SPARE_S,
    )
    if ended.returncode:
        raise StartError("roundhouse tune failed; its last line says why")
    return output


def tuned(clients: int, quick: bool) -> list[Row]:
    """Short prompts, greedy, ``clients`` streams at once."""
    load = DECODE[clients]
    if quick:
        load = replace(load, requests=max(clients, load.requests // 2))
    config = picked(clients, quick)
    flags, threads = best(load, quick), best_threads(load)
    ours: list[Seen] = []
    llama: list[Seen] = []
    vllm: list[Seen] = []
    with ExitStack() as stack:
        system = replace(stack.enter_context(roundhouse("--config", str(config))), name="tuned")
        turns: tuple[tuple[System, list[Seen]], ...] = (
            (system, ours),
            (stack.enter_context(llama_server(flags)), llama),
            (stack.enter_context(vllm_serve(threads)), vllm),
        )
        for number in range(1 if quick else ROUNDS):
            for system, runs in turns:
                warm(system, load.clients)
                runs.append(load.run(system, SEED + 10 * load.clients + number))
                say(f"  {system.name}: {runs[-1].rate:.1f} tokens/s, {latencies(runs[-1:])}")
    choice = config.read_text().splitlines()[0].removeprefix(CHOSEN)
    note = f"ours ({choice}): {latencies(ours)}"
    others = {
        f"llama-server ({flags})": llama,
        f"vllm serve ({f'threads on cores {threads}' if threads else 'default threads'})": vllm,
    }
    better = max(others, key=lambda name: rate(others[name]))
    return [
        Row.against(
            f"tuned_c{clients}",
            f"what tune picks, beside {name.partition(' (')[0]}: {load.what}",
            rate(ours),
            rate(runs),
            BAR if name == better else None,
            note=f"{note}; {name}: {latencies(runs)}",
        )
        for name, runs in others.items()
    ]
