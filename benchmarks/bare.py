"""A bare Python loop over llama.cpp's low-level API: what the engine gives without a server.

For information, beside the scenarios: greedy by numpy's argmax, one thread of control, nothing
waited for. ``python -m benchmarks.bare`` is the process that does it; JSON in, JSON out.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.jobs import LoadError
from benchmarks.prompts import distinct, sharing
from benchmarks.rows import Row
from benchmarks.systems import model_path

THREADS, CONTEXT, BATCH = 2, 16384, 512
PROMPT, NEW = 32, 64
PREFIX, SHARED_NEW, SHARED_CLIENTS, SHARED_WAVES = 600, 32, 16, 2
# Requests per sequence in each decode run.
WAVES = {1: 8, 8: 3, 32: 2}
FLASH_ATTENTION = {"on": 1, "off": 0}


@dataclass(slots=True)
class Loop:
    """A context and a batch; every method is one or more decode calls."""

    lib: Any
    context: Any
    batch: Any
    vocab: int

    def compute(self, work: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Decodes (sequence, position, token, wants logits) and returns the argmax of each wanted.

        Raises ``LoadError`` if the engine refuses.
        """
        drawn: list[int] = []
        for start in range(0, len(work), BATCH):
            part = work[start : start + BATCH]
            for index, (sequence, position, token, wanted) in enumerate(part):
                self.batch.token[index] = token
                self.batch.pos[index] = position
                self.batch.n_seq_id[index] = 1
                self.batch.seq_id[index][0] = sequence
                self.batch.logits[index] = wanted
            self.batch.n_tokens = len(part)
            if self.lib.llama_decode(self.context, self.batch) != 0:
                raise LoadError("llama_decode failed")
            wants = sum(wanted for *_, wanted in part)
            if wants:
                logits = self.lib.llama_get_logits(self.context)
                rows = np.ctypeslib.as_array(logits, shape=(wants, self.vocab))
                drawn += rows.argmax(axis=1).tolist()
        return drawn

    def generate(self, prompts: Sequence[Sequence[int]], start: int, tokens: int) -> int:
        """Prefills each prompt from position ``start`` on, then decodes; counts the tokens."""
        last = [len(prompt) - 1 for prompt in prompts]
        work = [
            (sequence, start + index, token, index == last[sequence])
            for sequence, prompt in enumerate(prompts)
            for index, token in enumerate(prompt)
        ]
        drawn = self.compute(work)
        for step in range(tokens - 1):
            work = [
                (sequence, start + len(prompts[sequence]) + step, token, True)
                for sequence, token in enumerate(drawn)
            ]
            drawn = self.compute(work)
        return len(prompts) * tokens

    def forget(self, sequences: Sequence[int], start: int) -> None:
        """Removes what the sequences have from position ``start`` on."""
        memory = self.lib.llama_get_memory(self.context)
        for sequence in sequences:
            self.lib.llama_memory_seq_rm(memory, sequence, start, -1)


@contextmanager
def loop(sequences: int, flash_attention: int) -> Iterator[Loop]:
    """Loads the embedded model for the length of a block."""
    import llama_cpp as lib

    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(
        str(model_path()).encode(), lib.llama_model_default_params()
    )
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, BATCH, BATCH
    params.n_seq_max, params.kv_unified = sequences, True
    params.n_threads = params.n_threads_batch = THREADS
    params.flash_attn_type = flash_attention
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(BATCH, 0, 1)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    try:
        yield Loop(lib, context, batch, vocab)
    finally:
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        lib.llama_model_free(model)


def decode_rates(flash_attention: int) -> dict[str, float]:
    """Tokens per second of the decode scenarios, by the number of sequences."""
    rates = {}
    with loop(32, flash_attention) as bare_loop:
        for count, waves in WAVES.items():
            tokens, began = 0, perf_counter()
            for wave in range(waves):
                bare_loop.forget(range(count), 0)
                tokens += bare_loop.generate(distinct(count, PROMPT, 7000 + wave), 0, NEW)
            rates[f"decode_c{count}"] = tokens / (perf_counter() - began)
            bare_loop.forget(range(count), 0)
    return rates


def prefix_rate(flash_attention: int) -> float:
    """Tokens per second of the shared prefix, which is computed once and copied."""
    sequences = range(SHARED_CLIENTS)
    tails = [
        prompt[PREFIX:] for prompt in sharing(SHARED_CLIENTS * SHARED_WAVES, PREFIX, PROMPT, 7100)
    ]
    prefix = sharing(1, PREFIX, 1, 7100)[0][:PREFIX]
    with loop(SHARED_CLIENTS, flash_attention) as bare_loop:
        tokens, began = 0, perf_counter()
        bare_loop.compute([(0, index, token, False) for index, token in enumerate(prefix)])
        memory = bare_loop.lib.llama_get_memory(bare_loop.context)
        for sequence in sequences[1:]:
            bare_loop.lib.llama_memory_seq_cp(memory, 0, sequence, 0, PREFIX)
        for wave in range(SHARED_WAVES):
            bare_loop.forget(sequences, PREFIX)
            wanted = tails[wave * SHARED_CLIENTS : (wave + 1) * SHARED_CLIENTS]
            tokens += bare_loop.generate(wanted, PREFIX, SHARED_NEW)
        return tokens / (perf_counter() - began)


def bare(quick: bool) -> list[Row]:
    """The loop's rates with flash attention on and off; no bars."""
    rows = []
    for name, kind in FLASH_ATTENTION.items():
        if quick and name == "off":
            continue
        command = [sys.executable, "-m", "benchmarks.bare", str(kind)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != 0:
            raise LoadError(f"the bare loop ended with {done.returncode}: {done.stderr[-1000:]}")
        for what, rate in json.loads(done.stdout.splitlines()[-1]).items():
            text = f"bare loop, flash attention {name}: {what}"
            rows.append(Row.fact("bare", text, rate, unit="tokens/s"))
    return rows


def main() -> None:
    """Measures in this process and prints the rates."""
    kind = int(sys.argv[1])
    print(json.dumps(decode_rates(kind) | {"shared_prefix": prefix_rate(kind)}))


if __name__ == "__main__":
    main()
