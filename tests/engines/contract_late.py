"""What engines must do that start a step while the draws of the one before are under way.

A subclass gives the fixtures of ``EngineContract``, of an engine none of whose draws are done
before somebody asks for them.
"""

import pytest

from shards.engines.base import Engine, Plan, SamplingParams
from shards.engines.caller import CallerEngine, late
from tests.engines.driving import admit

GREEDY = SamplingParams()
WARM = SamplingParams(temperature=0.9, seed=3)
PENAL = SamplingParams(temperature=0.9, seed=3, repetition_penalty=1.2)


def known(engine: Engine, sequence: int) -> list[int]:
    assert isinstance(engine, CallerEngine)
    return engine._residents.by_sequence[sequence].tokens


class LateContract:
    @pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
    def test_a_step_starts_without_the_tokens_of_the_one_before(
        self, engine: Engine, prompts: list[list[int]], sampling: SamplingParams
    ) -> None:
        prompt, other = prompts[:2]
        first = engine.start(Plan(admits=[admit(1, prompt, sampling)], work=[(1, len(prompt))]))
        plan = Plan(admits=[admit(2, other, sampling)], work=[(2, len(other)), (1, 1)])
        second = engine.start(plan)
        assert known(engine, 1)[len(prompt) :] == [late(0), late(1)]
        assert known(engine, 2)[len(other) :] == [late(0)]
        tokens = first.finish().tokens
        assert known(engine, 1)[len(prompt) :] == [*tokens, late(1)]
        assert second.finish().tokens == [known(engine, 2)[-1], known(engine, 1)[-1]]
        assert min(known(engine, 1) + known(engine, 2)) >= 0

    def test_a_row_for_the_host_waits_for_what_is_under_way(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        prompt, other = prompts[:2]
        first = engine.start(Plan(admits=[admit(1, prompt)], work=[(1, len(prompt))]))
        plan = Plan(admits=[admit(2, other, PENAL)], work=[(2, len(other)), (1, 1)])
        second = engine.start(plan)
        assert known(engine, 1)[len(prompt)] >= 0
        assert second.done
        assert first.finish().sequences == [1]
        assert second.finish().sequences == [2, 1]
