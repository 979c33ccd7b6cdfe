"""Real weights: SmolLM2 and Gemma 3 against ``transformers``, in float32."""

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer

from shards.engines.base import Admit, Plan, SamplingParams
from shards.engines.torch_engine import TorchEngine
from shards.engines.torch_weights import Checkpoint
from tests.heavy.models import gemma3_gguf, smollm2_folder, smollm2_gguf
from tests.heavy.reference import GEMMA3_COUNT, gemma3_prompts, read
from tests.heavy.torch.made import CLOSE, answer, assert_same, make


@pytest.fixture(scope="module")
def smollm2() -> Iterator[TorchEngine]:
    engine = make(
        smollm2_folder(), dtype="float32", kv_tokens=8192, sequences_max=32, step_tokens_max=512
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [one["prompt"] for one in read()]


def test_smollm2_answers_as_transformers_did(
    smollm2: TorchEngine, prompts: list[list[int]]
) -> None:
    """All 32 prompts in one batch; the file has what ``generate`` says to each by itself."""
    smollm2.reset()
    seen = answer(smollm2, prompts, 64)
    assert len(seen) == 32
    for tokens, expected in zip(seen, read(), strict=True):
        assert_same(tokens, expected["tokens"], expected["margins"])


def test_first_logprobs_are_those_of_transformers(
    smollm2: TorchEngine, prompts: list[list[int]]
) -> None:
    smollm2.reset()
    sampling = SamplingParams(logprobs=True)
    for number, (prompt, expected) in enumerate(zip(prompts, read(), strict=True), start=1):
        outcome = smollm2.step(
            Plan(
                admits=[Admit(number, prompt, len(prompt), sampling)],
                work=[(number, len(prompt))],
            )
        )
        assert outcome.logprobs[number].logprob == pytest.approx(expected["logprob"], abs=CLOSE)


def test_sharing_a_long_prefix_gives_the_same_answers(
    smollm2: TorchEngine, prompts: list[list[int]]
) -> None:
    """Decoding reads a prefix that several sequences have in common once for all of them."""
    prefix = [token for prompt in prompts[:24] for token in prompt][:192]
    tails = prompts[24:31]
    smollm2.reset()
    alone = answer(smollm2, [prefix + tail for tail in tails], 16)
    smollm2.reset()
    smollm2.step(Plan(admits=[Admit(99, prefix, 192, SamplingParams())], work=[(99, 192)]))
    drawn: list[list[int]] = []
    for number, tail in enumerate(tails):
        tokens = [*prefix, *tail]
        made = Admit(number, tokens, len(tokens), SamplingParams(), 99, 192)
        drawn.append(smollm2.step(Plan(admits=[made], work=[(number, len(tail))])).tokens)
    numbers = range(len(tails))
    for _ in range(15):
        outcome = smollm2.step(Plan(work=[(number, 1) for number in numbers]))
        for number, token in zip(outcome.sequences, outcome.tokens, strict=True):
            drawn[number].append(token)
    (view,) = smollm2._model.step.views.values()
    assert [len(decodes.prefix) for decodes in view.decodes] == [192 // 16]
    assert drawn == alone


def test_a_gguf_file_gives_the_weights_of_its_folder() -> None:
    """The library's reader of GGUF files and ours agree to the last bit."""
    cpu = torch.device("cpu")
    models = [
        Checkpoint(path).load(torch.bfloat16, cpu, lambda _fraction: None)
        for path in (smollm2_gguf(), smollm2_folder())
    ]
    one, other = (dict(model.named_parameters()) for model in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_gemma_3_from_a_gguf_file_answers_as_transformers_does() -> None:
    """Windows of 512 tokens in most layers; the longest prompt goes beyond them."""
    engine = make(gemma3_gguf(), dtype="float32", kv_tokens=2048)
    tokenizer = Tokenizer.from_str(engine.tokenizer_files()["tokenizer.json"].decode())
    asked = gemma3_prompts(tokenizer)
    seen = answer(engine, asked, GEMMA3_COUNT)
    windows = {shape.kind.window for shape in engine._model.shapes}
    engine.close()
    assert windows == {0, 512}
    for prompt, tokens, expected in zip(asked, seen, read("gemma3"), strict=True):
        assert prompt == expected["prompt"]
        assert_same(tokens, expected["tokens"], expected["margins"])
