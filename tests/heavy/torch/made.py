"""Engines, models and helpers that the torch tests share."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from shards.engines import load
from shards.engines.base import Admit, Engine, EngineOptions, Plan, SamplingParams
from shards.engines.torch_engine import TorchEngine
from tests.heavy.models import write_byte_tokenizer

# Where the two likeliest tokens are so near, rounding may choose either.
CLOSE = 1e-3


def make(folder: Path, **changes: object) -> TorchEngine:
    """A torch engine; ``extra`` is a dict of engine options."""
    extra = changes.pop("extra", {})
    assert isinstance(extra, dict)
    fields = {"kv_tokens": 1024, "sequences_max": 8, "step_tokens_max": 256, "threads": 1}
    options = EngineOptions(
        folder,
        "model",
        extra=tuple((key, str(value)) for key, value in extra.items()),
        **{**fields, **changes},  # type: ignore[arg-type]
    )
    engine = load("torch", options, lambda _fraction: None)
    assert isinstance(engine, TorchEngine)
    return engine


def random_model(folder: Path, model_type: str, **config: object) -> transformers.PreTrainedModel:
    """Saves a small random model of any architecture, with a byte tokenizer; in float32."""
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 288,
        "max_position_embeddings": 512,
        # Wide enough for clear logits, and no tie, which would repeat one token for ever.
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 0,
    }
    made = transformers.AutoConfig.for_model(model_type, **{**small, **config})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return model


def reference(
    model: transformers.PreTrainedModel, prompt: Sequence[int], count: int
) -> tuple[list[int], list[float]]:
    """Greedy tokens of ``transformers.generate``, and the margin between the two likeliest."""
    made = model.generate(
        torch.tensor([list(prompt)]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.stack(made.logits)[:, 0].float().topk(2).values
    tokens: list[int] = made.sequences[0, len(prompt) :].tolist()
    return tokens, (top[:, 0] - top[:, 1]).tolist()


def answer(engine: Engine, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy tokens; each prompt is computed in two chunks while the earlier ones decode."""
    drawn: dict[int, list[int]] = {}

    def step(admits: list[Admit], work: list[tuple[int, int]]) -> None:
        outcome = engine.step(Plan(admits=admits, work=[(one, 1) for one in drawn] + work))
        for sequence, token in zip(outcome.sequences, outcome.tokens, strict=True):
            drawn.setdefault(sequence, []).append(token)

    limit = engine.describe().step_tokens_max - len(prompts)
    for number, prompt in enumerate(prompts, start=1):
        left = len(prompt)
        admits = [Admit(number, prompt, left, SamplingParams())]
        while left:
            part = min(limit, left // 2 or left)
            step(admits, [(number, part)])
            admits, left = [], left - part
    while min(map(len, drawn.values())) < count:
        step([], [])
    return [drawn[number][:count] for number in sorted(drawn)]


def assert_same(seen: list[int], expected: list[int], margins: list[float]) -> None:
    """Token by token; behind a tie that rounding decided, the answers are different texts."""
    for at, (token, wanted) in enumerate(zip(seen, expected, strict=True)):
        if token != wanted:
            assert margins[at] < CLOSE, f"token {at} is {token}, expected {wanted}"
            return
