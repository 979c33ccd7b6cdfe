"""Decode speed of one engine on one accelerator, against what its memory allows.

    python benchmarks/gpu/decode.py --engine torch --model FOLDER [--rows 1 16 64]
    python benchmarks/gpu/decode.py --engine llamacpp --model FILE.gguf

Each decode step must read all weights and the keys and values of every sequence once, so the
memory's bandwidth bounds the steps in a second. The bandwidth is that of a large copy on the very
device (read and written bytes), unless --bandwidth-gbps says it; llama.cpp has no such copy, and
torch makes it, if it is installed. The engine is driven directly: no router, no wire. The last line
of standard output is one JSON object.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from shards.engines import load
from shards.engines.base import Admit, Engine, EngineInfo, EngineOptions, Plan, SamplingParams

COPY_BYTES = 1 << 30
REPEATS = 10
WARM_STEPS = 8


def main() -> int:
    given = arguments()
    room = max(given.rows) * (given.prompt_tokens + given.new_tokens + WARM_STEPS + 64)
    options = EngineOptions(
        given.model,
        given.model.name,
        kv_tokens=room,
        sequences_max=max(given.rows),
        device=given.device,
        dtype=given.dtype,
        extra=tuple(tuple(option.split("=", 1)) for option in given.engine_option),
    )
    engine = load(given.engine, options, lambda _fraction: None)
    info = engine.describe()
    weight_bytes = info.weight_bytes - unread_bytes(given.model, info)
    bandwidth = given.bandwidth_gbps * 1e9 or measured_bandwidth(given.engine)
    table = []
    for rows in given.rows:
        sampling = SamplingParams(temperature=given.temperature, top_p=0.95)
        step_s = decode_step_s(engine, rows, given.prompt_tokens, given.new_tokens, sampling)
        length = given.prompt_tokens + WARM_STEPS + given.new_tokens // 2
        least_s = (weight_bytes + rows * length * kv_bytes(given.model, info)) / bandwidth
        table.append(
            {
                "rows": rows,
                "tokens_per_s": round(rows / step_s, 1),
                "limit_tokens_per_s": round(rows / least_s, 1),
                "share_of_limit": round(least_s / step_s, 3),
            }
        )
        print(f"{rows:4} rows: {table[-1]}")
    engine.close()
    print(
        json.dumps(
            {
                "benchmark": "gpu_decode",
                "engine": f"{info.engine} {info.engine_version}",
                "device": info.device,
                "model": info.model_id,
                "dtype": info.dtype,
                "options": given.engine_option,
                "temperature": given.temperature,
                "bandwidth_gbps": round(bandwidth / 1e9, 1),
                "decode": table,
            }
        )
    )
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="torch", choices=("torch", "jax", "llamacpp"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--bandwidth-gbps", type=float, default=0.0)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: greedy; else with top_p 0.95"
    )
    parser.add_argument("--engine-option", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def decode_step_s(
    engine: Engine, rows: int, prompt_tokens: int, new_tokens: int, sampling: SamplingParams
) -> float:
    """The median time of a step that decodes ``rows`` sequences."""
    engine.reset()
    vocabulary = engine.describe().vocab_size
    for row in range(rows):
        tokens = [(31 * row + 7 * at) % (vocabulary - 10) + 5 for at in range(prompt_tokens)]
        made = Admit(row, tokens, prompt_tokens, sampling)
        engine.step(Plan(admits=[made], work=[(row, prompt_tokens)]))
    plan = Plan(work=[(row, 1) for row in range(rows)])
    for _ in range(WARM_STEPS):
        engine.step(plan)
    times = []
    for _ in range(new_tokens):
        began = time.perf_counter()
        engine.step(plan)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def unread_bytes(model: Path, info: EngineInfo) -> int:
    """An embedding that is not the head as well: a step reads a row of it for each sequence."""
    if info.engine == "llamacpp":
        return 0
    config = json.loads((model / "config.json").read_text())
    if config.get("tie_word_embeddings"):
        return 0
    element = 4 if info.dtype == "float32" else 2
    return int(config["vocab_size"] * config["hidden_size"] * element)


def kv_bytes(model: Path, info: EngineInfo) -> int:
    """Bytes of keys and values of one token, from a folder's configuration or a file's metadata."""
    if info.engine == "llamacpp":
        from shards.engines.llama_sizes import kv_bytes_per_token
        from shards.gguf_file import read_metadata

        return kv_bytes_per_token(read_metadata(model))
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    element = 4 if info.dtype == "float32" else 2
    return int(2 * config["num_hidden_layers"] * kv_heads * width * element)


def measured_bandwidth(engine: str) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    copy = jax_copy() if engine == "jax" else torch_copy()
    copy()
    began = time.perf_counter()
    for _ in range(REPEATS):
        copy()
    return 2 * COPY_BYTES * REPEATS / (time.perf_counter() - began)


def torch_copy():
    import torch

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device.type != "cpu":
            torch.accelerator.synchronize()

    return copy


def jax_copy():
    import jax
    import jax.numpy as jnp

    source = jnp.zeros(COPY_BYTES // 4, jnp.float32)
    add = jax.jit(lambda array: array + 1)
    return lambda: add(source).block_until_ready()


if __name__ == "__main__":
    raise SystemExit(main())
