"""Constraints are compiled before a request is submitted: where, how often, and what is refused."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from router.app import Router
from router.ask import Ask, Constraint, ConstraintKind, Params
from router.config import GroupSpec, Settings
from router.core.events import Reason
from router.errors import Fault, RequestError
from router.fleet import Fleet, PrepareCall
from router.generation import Generation
from router.link import LinkDownError
from router.preparing import Preparer
from router.text import constraints
from router.text.tokenizer import Tokenizer
from shards.engines.scripted_text import Script
from tests.service.fakes import PATIENCE_S, Bench, bench_in, until
from tests.service.test_group_fleet import card

WORDS = Constraint(ConstraintKind.REGEX, "(yes|no)", "response_format")
BAD = Constraint(ConstraintKind.REGEX, "ab[", "response_format")


def ask_of(constraint: Constraint | None, **more: Any) -> Ask:
    params = Params(max_tokens=60, temperature=0.0, constraint=constraint)
    return Ask("the", params, **more)


# --- with groups that do as they are told


class Group:
    """What one group is asked; it answers when it is let go, with its fault if it has one."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.faults: dict[str, str] = {}
        self.cancelled = 0

    async def prepare(self, constraint: Any) -> None:
        self.asked.append(constraint.regex)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fault is not None:
            raise self.fault
        if constraint.regex in self.faults:
            raise RequestError(Fault.VALIDATION, self.faults[constraint.regex])


def bring_up(fleet: Fleet, name: str, call: PrepareCall, **changes: Any) -> None:
    tokenizer = Tokenizer.from_files(Script().files())
    changes.setdefault("features", ["grammar"])
    fleet.up(card(name, **changes), tokenizer, None, call)


@pytest.fixture
def fleet() -> Fleet:
    specs = [GroupSpec(name, None, (f"unix:///{name}",)) for name in "ghi"]
    return Fleet(Settings(max_concurrent_requests=4), specs)


@pytest.fixture
def groups(fleet: Fleet) -> list[Group]:
    made = [Group(), Group()]
    for name, group in zip("gh", made, strict=True):
        bring_up(fleet, name, group.prepare)
    return made


@pytest.fixture
def preparer(fleet: Fleet) -> Preparer:
    return Preparer(fleet, Settings(max_concurrent_requests=4))


async def test_every_group_that_can_is_asked_once(
    preparer: Preparer, fleet: Fleet, groups: list[Group]
) -> None:
    unable, other = Group(), Group()
    bring_up(fleet, "i", unable.prepare, features=["seed"])
    bring_up(fleet, "j", other.prepare, model_id="n")
    for _ in range(3):
        await preparer.prepare("m", ask_of(WORDS))
    assert [group.asked for group in (*groups, unable, other)] == [
        ["(yes|no)"],
        ["(yes|no)"],
        [],
        [],
    ]
    await preparer.prepare("m", ask_of(Constraint(ConstraintKind.LARK, "(yes|no)")))
    assert len(groups[0].asked) == 2
    await preparer.prepare("m", ask_of(None))
    assert len(groups[0].asked) == 2


async def test_a_worker_that_has_come_up_anew_is_asked_again(
    preparer: Preparer, fleet: Fleet, groups: list[Group]
) -> None:
    await preparer.prepare("m", ask_of(WORDS))
    fleet.down("g")
    bring_up(fleet, "g", groups[0].prepare, instance_id="another life")
    await preparer.prepare("m", ask_of(WORDS))
    assert [len(group.asked) for group in groups] == [2, 1]


async def test_equal_constraints_share_a_call_even_if_who_asked_goes_away(
    preparer: Preparer, groups: list[Group]
) -> None:
    for group in groups:
        group.gate.clear()
    calls = [asyncio.create_task(preparer.prepare("m", ask_of(WORDS))) for _ in range(3)]
    await until(lambda: all(group.asked for group in groups))
    calls[0].cancel()
    # Then one of those who wait asks in its place.
    await until(lambda: all(len(group.asked) == 2 for group in groups))
    assert [group.cancelled for group in groups] == [1, 1]
    for group in groups:
        group.gate.set()
    await asyncio.gather(*calls[1:])
    await preparer.prepare("m", ask_of(WORDS))
    assert [len(group.asked) for group in groups] == [2, 2]


async def test_what_is_refused_names_the_clients_own_parameter(
    preparer: Preparer, groups: list[Group]
) -> None:
    groups[1].fault = RequestError(Fault.VALIDATION, "unclosed class")
    groups[1].gate.clear()
    renamed = Constraint(WORDS.kind, WORDS.text, "grammar")
    calls = [
        asyncio.create_task(preparer.prepare("m", ask_of(one))) for one in (WORDS, renamed, renamed)
    ]
    await until(lambda: groups[1].asked)
    groups[1].gate.set()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    for error, field in zip(errors, ("response_format", "grammar", "grammar"), strict=True):
        assert isinstance(error, RequestError)
        assert (error.fault, error.field) == (Fault.VALIDATION, field)
        assert error.message == f"`{field}` cannot be compiled: unclosed class"
    # It is not remembered as compiled.
    groups[1].fault = None
    await preparer.prepare("m", ask_of(WORDS))
    assert len(groups[1].asked) == 2


async def test_of_several_parts_the_one_at_fault_is_named(
    preparer: Preparer, groups: list[Group]
) -> None:
    part = Constraint(WORDS.kind, "b", "tools.1.function.parameters")
    made = replace(WORDS, parts=(replace(WORDS, text="a"), part))
    groups[0].faults = {WORDS.text: "line 7: bad", "b": "bad"}
    with pytest.raises(RequestError) as caught:
        await preparer.prepare("m", ask_of(made))
    assert (caught.value.fault, caught.value.field) == (Fault.VALIDATION, part.field)
    assert caught.value.message == "`tools.1.function.parameters` cannot be compiled: bad"
    # If each of them can be compiled it is the whole that cannot.
    groups[0].faults = {WORDS.text: "line 7: bad"}
    with pytest.raises(RequestError, match="`response_format` cannot be compiled: line 7: bad"):
        await preparer.prepare("m", ask_of(made))


async def test_a_group_that_goes_down_is_left_out(preparer: Preparer, groups: list[Group]) -> None:
    groups[0].fault = LinkDownError("gone")
    await preparer.prepare("m", ask_of(WORDS))
    groups[0].fault = None
    await preparer.prepare("m", ask_of(WORDS))
    assert [len(group.asked) for group in groups] == [2, 1]


async def test_an_overloaded_worker_turns_the_request_away(
    preparer: Preparer, groups: list[Group]
) -> None:
    groups[0].fault = RequestError(Fault.OVERLOADED, "64 wait")
    with pytest.raises(RequestError, match="64 wait") as caught:
        await preparer.prepare("m", ask_of(WORDS))
    assert caught.value.fault is Fault.OVERLOADED


async def test_a_deadline_holds(preparer: Preparer, groups: list[Group]) -> None:
    groups[0].gate.clear()
    with pytest.raises(RequestError, match="deadline") as caught:
        await preparer.prepare("m", ask_of(WORDS, deadline_s=0.05))
    assert caught.value.fault is Fault.DEADLINE
    assert groups[0].cancelled == 1


async def test_no_more_wait_than_requests_may_be_open(
    preparer: Preparer, groups: list[Group]
) -> None:
    groups[0].gate.clear()
    many = [Constraint(ConstraintKind.REGEX, f"a{number}") for number in range(4)]
    calls = [asyncio.create_task(preparer.prepare("m", ask_of(one))) for one in many]
    await until(lambda: len(groups[0].asked) == 4)
    with pytest.raises(RequestError, match="4 requests wait") as caught:
        await preparer.prepare("m", ask_of(WORDS))
    assert caught.value.fault is Fault.OVERLOADED
    groups[0].gate.set()
    await asyncio.gather(*calls)
    await preparer.prepare("m", ask_of(WORDS))


async def test_without_any_group_up_the_request_waits_for_one(
    preparer: Preparer, fleet: Fleet, groups: list[Group]
) -> None:
    for name in "gh":
        fleet.down(name)
    await preparer.prepare("m", ask_of(WORDS))
    assert groups[0].asked == []


# --- with real workers


@asynccontextmanager
async def router_of(*groups: tuple[str, ...], **settings: Any) -> AsyncIterator[Router]:
    specs = [GroupSpec(f"g{n}", None, addresses) for n, addresses in enumerate(groups)]
    async with asyncio.timeout(3 * PATIENCE_S):
        async with Router(Settings(**settings), specs) as router:
            await until(lambda: all(router.fleet.groups_up().values()))
            yield router


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_in(tmp_path) as bench:
        yield bench


async def whole(generation: Generation) -> tuple[str, Reason]:
    async with generation:
        async for chunk in generation:
            if chunk.finish is not None:
                return chunk.finish.text, chunk.finish.reason
    raise AssertionError("no end")


async def answer(router: Router, ask: Ask) -> tuple[str, Reason]:
    return await whole(await router.service.generate(ask))


def compiled_by(bench: Bench, name: str) -> list[str]:
    """The constraints that a worker compiles from now on; a text with a lock waits for its key."""
    grammar = bench.worker(name)._engine.loaded.result().grammar
    assert grammar is not None
    honest, seen = grammar._compile, []

    def compile_(constraint: Any) -> Any:
        seen.append(constraint.text)
        for text, key in LOCKS.items():
            if text in constraint.text:
                key.wait(PATIENCE_S)
        return honest(constraint)

    grammar._compile = compile_  # type: ignore[method-assign]
    return seen


LOCKS: dict[str, threading.Event] = {}


async def test_an_answer_matches_and_a_schema_that_comes_again_costs_nothing(bench: Bench) -> None:
    ranks = [await bench.start(f"r{n}", rank=n, world=2) for n in range(2)]
    async with router_of(tuple(ranks)) as router:
        seen = [compiled_by(bench, f"r{n}") for n in range(2)]
        for _ in range(2):
            assert await answer(router, ask_of(WORDS)) in (("yes", Reason.EOS), ("no", Reason.EOS))
        assert seen == [["(yes|no)"], ["(yes|no)"]]


async def test_what_cannot_be_compiled_is_refused_before_the_core_hears_of_it(
    bench: Bench,
) -> None:
    async with router_of((await bench.start("w"),)) as router:
        for constraint, where in (
            (BAD, "character 3"),
            (
                constraints.json_schema({"properties": {"a": {"not": {}}}}, "response_format"),
                "#/properties/a",
            ),
            (constraints.grammar("start: x", "response_format"), "line 1, column 8"),
        ):
            with pytest.raises(RequestError) as caught:
                await router.service.generate(ask_of(constraint))
            assert caught.value.fault is Fault.VALIDATION
            assert caught.value.field == "response_format"
            assert where in caught.value.message
            assert "\n" not in caught.value.message
        assert bench.engines["w"].begun == 0


@pytest.mark.parametrize("field", ["min_tokens", "ignore_eos"])
async def test_what_contradicts_a_constraint_is_refused(bench: Bench, field: str) -> None:
    params = Params(constraint=WORDS, **{field: 1})  # type: ignore[arg-type]
    async with router_of((await bench.start("w"),)) as router:
        with pytest.raises(RequestError, match="where it is complete") as caught:
            await router.service.generate(Ask("the", params))
    assert (caught.value.fault, caught.value.field) == (Fault.VALIDATION, field)


async def test_compiling_a_schema_does_not_stall_streams(bench: Bench) -> None:
    """While a worker compiles, four streams go on; the new request waits, and is then answered."""
    key = LOCKS["huge"] = threading.Event()
    async with router_of((await bench.start("w", step_ms="1"),)) as router:
        seen = compiled_by(bench, "w")
        params = Params(max_tokens=4000, temperature=0.0)
        streams = [await router.service.generate(Ask(f"stream {n}", params)) for n in range(4)]
        got = [0] * 4

        async def read(number: int) -> None:
            async for chunk in streams[number]:
                got[number] += len(chunk.tokens)

        readers = [asyncio.create_task(read(number)) for number in range(4)]
        schema = {
            "type": "object",
            "properties": {"huge": {"enum": ["a"]}},
            "required": ["huge"],
            "additionalProperties": False,
        }
        asking = asyncio.create_task(
            answer(router, ask_of(constraints.json_schema(schema, "response_format")))
        )
        await until(lambda: seen)
        before, steps = list(got), bench.engines["w"].begun
        await until(lambda: all(now > then + 20 for now, then in zip(got, before, strict=True)))
        assert bench.engines["w"].begun > steps + 5
        assert not asking.done()
        key.set()
        text, reason = await asking
        assert json.loads(text) == {"huge": "a"}
        assert reason is Reason.EOS
        for number, reader in enumerate(readers):
            streams[number].cancel()
            reader.cancel()
        await asyncio.wait(readers)
    del LOCKS["huge"]


async def test_a_worker_that_has_forgotten_a_constraint_compiles_it_again(bench: Bench) -> None:
    async with router_of((await bench.start("w"),)) as router:
        first = await answer(router, ask_of(WORDS))
        grammar = bench.worker("w")._engine.loaded.result().grammar
        assert grammar is not None
        grammar._kept.clear()
        seen = compiled_by(bench, "w")
        assert await answer(router, ask_of(WORDS)) == first
        assert seen == ["(yes|no)"]


async def test_an_answer_goes_on_exactly_where_it_was_on_another_worker(bench: Bench) -> None:
    """The constraint travels with the tokens, and is compiled where they go."""
    constraint = Constraint(ConstraintKind.REGEX, "([a-z]{3} ){12}[0-9]", "grammar")
    addresses = [(await bench.start(name, step_ms="5"),) for name in "ab"]
    async with router_of(*addresses) as router:
        unbroken, _ = await answer(router, ask_of(constraint))
        generation = await router.service.generate(ask_of(constraint))
        async with generation:
            text = (await anext(generation)).text
            busy = next(name for name in "ab" if bench.engines[name]._residents.by_sequence)
            await bench.kill(busy)
            async for chunk in generation:
                text += chunk.text
        assert text == unbroken


async def test_what_was_asked_while_no_worker_was_up_is_refused_in_the_same_words(
    bench: Bench,
) -> None:
    async with router_of((await bench.start("w"),)) as router:
        with pytest.raises(RequestError) as told:
            await router.service.generate(ask_of(BAD))
        await bench.kill("w")
        await until(lambda: not any(router.fleet.groups_up().values()))
        generation = await router.service.generate(ask_of(BAD))
        sound = await router.service.generate(ask_of(WORDS))
        await bench.start("w")
        with pytest.raises(RequestError) as caught:
            await whole(generation)
        assert (caught.value.fault, caught.value.field) == (Fault.VALIDATION, "response_format")
        assert caught.value.message == told.value.message
        assert (await whole(sound))[0] in ("yes", "no")
