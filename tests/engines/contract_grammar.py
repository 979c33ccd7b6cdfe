"""The part of the contract that is about constraints: every answer matches, whatever the model.

Constraints are bounded here, so that every answer has an end even if the model is made of noise.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from shards.engines.base import Constraint, ConstraintKind, Engine, Plan, SamplingParams
from tests.engines.driving import GREEDY, admit, decode, generate, shareable

# Enough for the longest answer of one-byte tokens, white space included.
TOKENS_MAX = 700
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["plain", "größer", "🚂"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "kind", "count"],
    "additionalProperties": False,
}
REGEX = r"[0-9]{4}-[A-Z]{2,5}(é|🚂)?"
LARK = 'start: HELLO " " /[a-z]{1,8}/ end?\nHELLO: "hi" | "hey"\nend: "!" | "?"\n'
CHOICE = 'start: CHOICE\nCHOICE: "apple" | "apple pie" | "日本" | "say \\"no\\""\n'


def matches_schema(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


CASES: dict[str, tuple[Constraint, Callable[[str], object]]] = {
    "schema": (Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA)), matches_schema),
    "regex": (Constraint(ConstraintKind.REGEX, REGEX), lambda text: re.fullmatch(REGEX, text)),
    "lark": (
        Constraint(ConstraintKind.LARK, LARK),
        lambda text: re.fullmatch("(hi|hey) [a-z]{1,8}[!?]?", text),
    ),
    "choice": (
        Constraint(ConstraintKind.LARK, CHOICE),
        lambda text: text in ("apple", "apple pie", "日本", 'say "no"'),
    ),
}
WAYS = {
    "greedy": {},
    "sampled": {"temperature": 1.3, "seed": 11},
    "filtered": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 5},
    "penalised": {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.3, "min_p": 0.02},
}


def under(case: str, way: str = "greedy", **more: Any) -> SamplingParams:
    return SamplingParams(constraint=CASES[case][0], **WAYS[way], **more)


def is_end(engine: Engine, token: int) -> bool:
    return token in engine.describe().eos_token_ids


def finish(engine: Engine, sequence: int, tokens: list[int]) -> list[int]:
    """Goes on to the end of the answer, which is part of what is returned."""
    while not is_end(engine, tokens[-1]):
        assert len(tokens) < TOKENS_MAX, "the answer has no end"
        tokens += decode(engine, sequence, 1)
    return tokens


def answer(engine: Engine, prompt: Sequence[int], sampling: SamplingParams) -> list[int]:
    engine.reset()
    return finish(engine, 1, generate(engine, 1, prompt, 1, sampling))


def text_of(engine: Engine, tokens: Sequence[int]) -> str:
    tokenizer = Tokenizer.from_str(engine.tokenizer_files()["tokenizer.json"].decode())
    assert is_end(engine, tokens[-1])
    text: str = tokenizer.decode(list(tokens[:-1]), skip_special_tokens=False)
    return text


class GrammarContract:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("case", CASES)
    def test_every_answer_matches(
        self, engine: Engine, prompts: list[list[int]], case: str, way: str
    ) -> None:
        for prompt in prompts[:2]:
            text = text_of(engine, answer(engine, prompt, under(case, way)))
            assert CASES[case][1](text), text

    def test_constraints_keep_to_their_own_sequences(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        free = generate(engine, 1, prompts[0], 16)
        alone = {case: answer(engine, prompts[1], under(case)) for case in CASES}
        engine.reset()
        made = [admit(1, prompts[0], GREEDY)]
        made += [admit(n, prompts[1], under(case)) for n, case in enumerate(CASES, start=2)]
        drawn: dict[int, list[int]] = {}
        for step in range(16):
            # One after the other joins those that decode.
            admits = made[step : step + 1]
            work = [(sequence, 1) for sequence in drawn]
            work += [(one.sequence, len(one.tokens)) for one in admits]
            outcome = engine.step(Plan(admits=admits, work=work))
            assert not outcome.failures
            for sequence, token in zip(outcome.sequences, outcome.tokens, strict=True):
                drawn.setdefault(sequence, []).append(token)
        assert drawn[1] == free
        for number, case in enumerate(CASES, start=2):
            expected, found = alone[case], drawn[number]
            assert found[: len(expected)] == expected[: len(found)]
            # A plan on its way may ask for more than the end; nothing else comes of it.
            assert all(is_end(engine, token) for token in found[len(expected) :])

    @pytest.mark.parametrize("way", ["greedy", "sampled"])
    def test_continues_where_it_was(
        self, engine: Engine, prompts: list[list[int]], way: str
    ) -> None:
        prompt, sampling = prompts[0], under("schema", way)
        limit = engine.describe().step_tokens_max
        whole = answer(engine, prompt, sampling)
        for known in (1, len(whole) // 2, len(whole) - 1):
            engine.reset()
            tokens = [*prompt, *whole[:known]]
            engine.step(Plan(admits=[admit(1, tokens, sampling, prompt_len=len(prompt))]))
            rest: list[int] = []
            for start in range(0, len(tokens), limit):
                rest = engine.step(Plan(work=[(1, min(limit, len(tokens) - start))])).tokens
            assert whole[:known] + finish(engine, 1, rest) == whole

    def test_chunked_prefill_is_as_unchunked(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        prompt, sampling = prompts[0], under("schema")
        whole = answer(engine, prompt, sampling)
        engine.reset()
        engine.step(Plan(admits=[admit(1, prompt, sampling)], work=[(1, 9)]))
        first = engine.step(Plan(work=[(1, len(prompt) - 9)]))
        assert finish(engine, 1, first.tokens) == whole

    def test_a_prefix_is_shared_and_a_constraint_is_not(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        if "prefix_sharing" not in engine.describe().features:
            return
        prompt, sampling = prompts[0], under("regex")
        whole = answer(engine, prompt, sampling)
        engine.reset()
        generate(engine, 1, prompt, 2, under("schema"))
        share = shareable(engine, len(prompt) - 1)
        made = admit(2, prompt, sampling, share_from=1, share_len=share)
        first = engine.step(Plan(admits=[made], work=[(2, len(prompt) - share)]))
        assert finish(engine, 2, first.tokens) == whole

    def test_what_cannot_be_compiled_fails_alone(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        free = generate(engine, 1, prompts[0], 2)
        engine.reset()
        bad = SamplingParams(constraint=Constraint(ConstraintKind.LARK, "start: nothing\n"))
        made = [admit(1, prompts[0]), admit(2, prompts[1], bad)]
        work = [(1, len(prompts[0])), (2, len(prompts[1]))]
        outcome = engine.step(Plan(admits=made, work=work))
        assert outcome.tokens == free[:1]
        assert list(outcome.failures) == [2]
        assert "line 1, column 8" in outcome.failures[2]
        assert "nothing" in outcome.failures[2]
        assert "\n" not in outcome.failures[2]
        assert decode(engine, 1, 1) == free[1:]

    def test_a_beginning_that_does_not_match_fails_alone(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        prompt = prompts[0]
        token = next(token for token in prompts[1] if not is_end(engine, token))
        choice = Constraint(ConstraintKind.LARK, 'start: "\\u0001\\u0002\\u0001"\n')
        made = admit(1, [*prompt, token], SamplingParams(constraint=choice), prompt_len=len(prompt))
        outcome = engine.step(Plan(admits=[made], work=[(1, len(prompt) + 1)]))
        assert list(outcome.failures) == [1]
        assert "does not match" in outcome.failures[1]
        assert outcome.tokens == []
