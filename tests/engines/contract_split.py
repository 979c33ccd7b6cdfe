"""The contract, as an engine keeps it that gives each sequence a part of the cache for itself."""

import pytest

from shards.engines.base import Engine, Plan, PlanError
from tests.engines.contract import EngineContract, admit, fill
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_prompts import PromptContract

# Each is longer than what is shared at least.
PROMPTS = [[(7 * n + 13 * k) % 250 for k in range(24 + 7 * n)] for n in range(2, 6)]
PART = 512


class SplitContract(GrammarContract, PromptContract, EngineContract):
    """The suite; a subclass gives the engine: 12 sequences, with ``PART`` tokens for each."""

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        return PROMPTS

    def test_kv_budget_counts_shared_tokens_once(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        """There is no common budget: all may be full at once, whatever they share."""
        info = engine.describe()
        tokens = (prompts[0] * PART)[:PART]
        fill(engine, 1, tokens)
        for number in range(2, info.sequences_max + 1):
            made = admit(number, tokens, share_from=number - 1, share_len=PART - 32)
            engine.step(Plan(admits=[made], work=[(number, 32)]))
        with pytest.raises(PlanError, match="sequences_max"):
            fill(engine, 20, prompts[1])
        fill(engine, 21, tokens, drops=[1])
