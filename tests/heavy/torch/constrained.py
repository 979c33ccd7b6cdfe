"""Constrained answers of a group of ranks, for the engines that compute with several."""

import json
import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from shards.v1 import shard_pb2 as pb
from tests.engines.contract_grammar import REGEX, SCHEMA, TOKENS_MAX, matches_schema
from tests.heavy.models import TINY_EOS, TINY_VOCAB
from tests.heavy.torch.group import Answer, Group

SCHEMA_ASKED = {"json_schema": json.dumps(SCHEMA)}
FREE_TOKENS = 24
# The number of the sequence that is interrupted.
BROKEN = 7


def admit(sequence: int, known: list[int] | None = None, **sampling: object) -> pb.Admit:
    """A sequence with a prompt of its own, that tells the log probabilities of all tokens.

    ``known`` are tokens of its answer that had been drawn before.
    """
    prompt = np.random.default_rng(sequence).integers(3, 250, 10 + 5 * sequence).tolist()
    asked = pb.Sampling(logprobs=True, top_logprobs=TINY_VOCAB, **sampling)
    return pb.Admit(
        sequence=sequence, tokens=[*prompt, *(known or ())], prompt_len=len(prompt), sampling=asked
    )


def text_of(model: Path, tokens: list[int]) -> str:
    assert tokens[-1] == TINY_EOS, "the answer has no end"
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text: str = tokenizer.decode(tokens[:-1], skip_special_tokens=False)
    return text


def two_ranks_keep_to_constraints(model: Path, one: Group, two: Group) -> None:
    """Beside each other and beside a free one: documents that validate, and one rank's tokens."""
    schema, regex = pb.Constraint(**SCHEMA_ASKED), pb.Constraint(regex=REGEX)
    admits = [
        admit(1, constraint=schema),
        admit(2, constraint=schema, temperature=1.3, seed=11),
        admit(3),
        admit(4, constraint=regex),
    ]
    counts = {1: TOKENS_MAX, 2: TOKENS_MAX, 3: FREE_TOKENS, 4: TOKENS_MAX}
    alone, found = one.answers(admits, counts), two.answers(admits, counts)
    for made in (alone, found):
        for sequence in (1, 2):
            assert matches_schema(text_of(model, made[sequence].tokens))
        assert re.fullmatch(REGEX, text_of(model, made[4].tokens))
    for sequence in (1, 3, 4):
        alone[sequence].assert_same(found[sequence].tokens)


class Interrupted:
    """A constrained answer of a group that is lost in the middle of it, and of its successor."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._whole = Answer()
        self._begun: list[int] = []

    def begin(self, first: Group) -> None:
        """Draws it once to its end, and half of it once more."""
        asked = admit(BROKEN, **self._sampling)
        self._whole = first.answers([asked], {BROKEN: TOKENS_MAX})[BROKEN]
        size, half = len(asked.tokens), len(self._whole.tokens) // 2
        work = {"work_sequences": [BROKEN], "work_tokens": [size]}
        self._begun = [first.step(admits=[asked], **work)[BROKEN]]
        while len(self._begun) < half:
            self._begun.append(first.step(work_sequences=[BROKEN], work_tokens=[1])[BROKEN])
        assert self._begun == self._whole.tokens[:half]

    def go_on(self, second: Group) -> None:
        """Goes on behind what had been drawn, as a router does: it is the document it would be."""
        again, done = admit(BROKEN, self._begun, **self._sampling), len(self._begun)
        rest = second.answers([again], {BROKEN: TOKENS_MAX})[BROKEN]
        assert matches_schema(text_of(self._model, [*self._begun, *rest.tokens]))
        left = Answer(self._whole.tokens[done:], self._whole.told[done:])
        left.assert_same(rest.tokens)

    @property
    def _sampling(self) -> dict[str, object]:
        return {"constraint": pb.Constraint(**SCHEMA_ASKED)}
