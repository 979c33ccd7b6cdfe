"""Tokens a second of a whole server on one accelerator, through REST, by streams at once.

    python benchmarks/gpu/serve.py --engine torch --model FOLDER [--clients 1 16 64]

Beside ``decode.py``, which drives the engine directly, this tells what router, gRPC and worker take
of it. Closed loops of streaming completions, greedy or, with a temperature, sampled with top_p
0.95; the load generator is a process of its own. The last line of standard output is one JSON
object.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.jobs import Seen, percentile
from benchmarks.prompts import scripted
from benchmarks.systems import System, roundhouse

ROUNDS = 3


def main() -> int:
    given = arguments()
    options = [str(given.model), "--engine", given.engine, "--max-total-tokens", "2048"]
    for option in given.engine_option:
        options += ["--engine-option", option]
    table = []
    with roundhouse(*options) as system:
        measure(system, given, max(given.clients), 1)  # what is compiled or captured late
        for clients in given.clients:
            seen = measure(system, given, clients, ROUNDS)
            table.append(row(clients, seen))
            print(f"{clients:4} clients: {table[-1]}", flush=True)
    told = {"engine": given.engine, "model": given.model.name, "temperature": given.temperature}
    print(json.dumps({"benchmark": "gpu_serve", **told, "serve": table}))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--engine-option", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def measure(system: System, given: argparse.Namespace, clients: int, rounds: int) -> Seen:
    """Each client asks so many times. Raises ``LoadError`` on any error."""
    prompts = scripted(rounds * clients, given.prompt_tokens, clients)
    bodies = [body(prompt, given) for prompt in prompts]
    return system.load(bodies, clients, given.new_tokens).raise_errors()


def body(prompt: list[int], given: argparse.Namespace) -> str:
    asked = {
        "prompt": prompt,
        "max_tokens": given.new_tokens,
        "temperature": given.temperature,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if given.temperature:
        asked |= {"top_p": 0.95, "seed": 1}
    return json.dumps(asked)


def row(clients: int, seen: Seen) -> dict[str, float]:
    """One line of the table; times in milliseconds."""
    return {
        "clients": clients,
        "tokens_per_s": round(seen.rate, 1),
        "first_ms_p50": round(percentile(seen.first_s, 50) * 1e3, 1),
        "gap_ms_p50": round(percentile(seen.gaps_s, 50) * 1e3, 3),
        "gap_ms_p99": round(percentile(seen.gaps_s, 99) * 1e3, 3),
        "generator_us_per_token": round(seen.generator_us, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
