"""The contract on a tiny random Llama in float32, and that serving compiles nothing.

Both kinds of programs: those of a CPU, and those of other devices.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from shards.engines import load
from shards.engines.base import Admit, Engine, EngineOptions, ModelError, Plan, SamplingParams
from shards.engines.jax_engine import PROGRAMS, JaxEngine, cache_share
from tests.engines.contract import EngineContract, admit, decode, generate
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_prompts import PromptContract
from tests.heavy.models import tiny_llama_folder

TEXTS = (
    "The railway came to the valley in the spring",
    "Water boils at a lower temperature on a mountain",
    "Once upon a time there was a small engine",
    "def fibonacci(n): return n if n < 2 else",
)


def options(**changes: object) -> EngineOptions:
    given = {
        "model": tiny_llama_folder(),
        "model_id": "tiny",
        "kv_tokens": 1024,
        "sequences_max": 12,
        "step_tokens_max": 128,
        "device": "cpu",
        # The suite also shares prefixes of eight tokens.
        "extra": (("page_tokens", "8"),),
        **changes,
    }
    return EngineOptions(**given)  # type: ignore[arg-type]


def make(**changes: object) -> JaxEngine:
    engine = load("jax", options(**changes), lambda _fraction: None)
    assert isinstance(engine, JaxEngine)
    return engine


def prompts_of(engine: Engine) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(engine.tokenizer_files()["tokenizer.json"].decode())
    return [tokenizer.encode(text).ids[: 24 + 3 * n] for n, text in enumerate(TEXTS)]


# Those of an accelerator draw on the device, too.
WAYS = {
    "layer": (("program", "layer"),),
    "step": (("program", "step"),),
    "device": (("program", "step"), ("argmax", "device"), ("sample", "device")),
}


@pytest.fixture(scope="module", params=WAYS)
def made(request: pytest.FixtureRequest) -> Iterator[JaxEngine]:
    engine = make(extra=(("page_tokens", "8"), *WAYS[request.param]))
    yield engine
    engine.close()


@pytest.fixture
def engine(made: JaxEngine) -> JaxEngine:
    made.reset()
    return made


@pytest.fixture
def prompts(engine: JaxEngine) -> list[list[int]]:
    return prompts_of(engine)


class TestContract(GrammarContract, PromptContract, EngineContract):
    """See there."""


def test_serving_compiles_nothing(engine: JaxEngine) -> None:
    """Steps of all shapes, with every kind of sampling, start no compilation and no trace."""
    assert compiled_by(lambda: serve_all_shapes(engine)) == []


def compiled_by(call: Callable[[], object]) -> list[str]:
    """The compilations and traces that the call starts."""
    compiled: list[str] = []

    def listen(event: str, _seconds: float, **_facts: object) -> None:
        if "compile" in event or "trace" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 3.5 + 7)(np.float32(1.0))
        assert compiled, "the listener hears compilations"
        compiled.clear()
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return compiled


def serve_all_shapes(engine: JaxEngine) -> None:
    limit = engine.describe().step_tokens_max
    samplings = (
        SamplingParams(prompt_logprobs=True),
        SamplingParams(temperature=1.0, top_k=5, logprobs=True),
        SamplingParams(temperature=1.0, logprobs=True, top_logprobs=2),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.0, repetition_penalty=1.1),
    )
    for count in (1, 2, 3, 5, 12):
        for chunk in (1, 2, 7, 31, 64, limit):
            engine.reset()
            tokens = [token % 250 for token in range(7, 7 + max(2, min(chunk, limit // count)))]
            admits = [
                Admit(n, tokens, len(tokens), samplings[(n + chunk) % 5])
                for n in range(1, count + 1)
            ]
            each = min(chunk, len(tokens))
            engine.step(Plan(admits=admits, work=[(n, each) for n in range(1, count + 1)]))
            if each == len(tokens):
                outcome = engine.step(Plan(work=[(n, 1) for n in range(1, count + 1)]))
                assert len(outcome.tokens) == count
    serve_all_widths(engine)


def serve_all_widths(engine: JaxEngine) -> None:
    """One sequence that grows until it has every page, beside few and beside many short ones."""
    info = engine.describe()
    for count in (1, 7):
        engine.reset()
        short = [3, 5, 7]
        admits = [Admit(n, short, len(short), SamplingParams()) for n in range(2, count + 1)]
        engine.step(Plan(admits=admits, work=[(admit.sequence, len(short)) for admit in admits]))
        rest = info.kv_tokens - 12 * info.page_tokens
        tokens = [token % 250 for token in range(rest)]
        admits = [Admit(1, tokens, len(tokens), SamplingParams())]
        while rest:
            chunk = min(rest, info.step_tokens_max)
            outcome = engine.step(Plan(admits=admits, work=[(1, chunk)]))
            admits, rest = [], rest - chunk
        assert len(outcome.tokens) == 1
        outcome = engine.step(Plan(work=[(n, 1) for n in range(1, count + 1)]))
        assert len(outcome.tokens) == count


# The argmax is a program behind those of the step: of the kinds of these one is enough.
@pytest.mark.parametrize("made", ["layer"], indirect=True)
def test_argmax_on_the_device_is_as_on_the_host(
    engine: JaxEngine, prompts: list[list[int]]
) -> None:
    expected = [generate(engine, n, prompt, 6) for n, prompt in enumerate(prompts, start=1)]
    device = make(extra=(("argmax", "device"),))
    try:
        work = [(n, len(prompt)) for n, prompt in enumerate(prompts, start=1)]
        first = Plan(admits=[admit(n, prompts[n - 1]) for n, _ in work], work=work)
        outcomes = [device.step(first)]
        outcomes += [device.step(Plan(work=[(n, 1) for n, _ in work])) for _ in range(5)]
        assert [[o.tokens[n] for o in outcomes] for n in range(len(prompts))] == expected
    finally:
        device.close()


def test_programs_of_whole_steps_draw_what_programs_of_layers_draw() -> None:
    """Through all widths: a sequence that passes 16 pages beside a long one and a short one."""
    drawn = []
    for kind in PROGRAMS:
        engine = make(sequences_max=4, extra=(("page_tokens", "8"), ("program", kind)))
        try:
            drawn.append(_through_widths(engine))
        finally:
            engine.close()
    assert drawn[0] == drawn[1]


def _through_widths(engine: JaxEngine) -> list[list[int]]:
    lengths = {1: 120, 2: 500, 3: 20}
    for sequence, length in lengths.items():
        tokens = np.random.default_rng(sequence).integers(0, 256, length).tolist()
        admits = [admit(sequence, tokens)]
        for start in range(0, length, 100):
            count = min(100, length - start)
            outcome = engine.step(Plan(admits=admits, work=[(sequence, count)]))
            admits = []
        assert len(outcome.tokens) == 1
    alone = [decode(engine, sequence, 20) for sequence in lengths]
    together = [engine.step(Plan(work=[(n, 1) for n in lengths])).tokens for _ in range(12)]
    return [*alone, *together]


def test_programs_of_whole_steps_update_the_cache_in_place() -> None:
    engine = make(sequences_max=4, extra=(("page_tokens", "8"), ("program", "step")))
    try:
        caches = engine._programs._arrays.caches
        bytes_all = sum(cache.nbytes for cache in caches)
        steps = engine._programs._steps._step  # type: ignore[attr-defined]
        assert {bucket.pages for bucket in steps if bucket.wide} == {16, 32, 64, 128}
        for program in steps.values():
            assert program.memory_analysis().alias_size_in_bytes == bytes_all
    finally:
        engine.close()


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_is_given_the_cache_for_good(program: str) -> None:
    """What it returns lies where the cache was: there is never a second one in memory."""
    engine = make(sequences_max=4, extra=(("page_tokens", "8"), ("program", program)))
    try:
        (cache, *_), steps = engine._programs._arrays.caches, engine._programs._steps
        programs = {**getattr(steps, "_layer", {}), **getattr(steps, "_step", {})}
        kept = {one.memory_analysis().alias_size_in_bytes for one in programs.values()}
        assert kept == {cache.nbytes}
    finally:
        engine.close()


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_step_copies_the_cache(program: str) -> None:
    """Not for a single row either, whose write is no scatter."""
    engine = make(
        kv_tokens=16384, sequences_max=4, step_tokens_max=32, extra=(("program", program),)
    )
    try:
        least = min(cache.nbytes for cache in engine._programs._arrays.caches)
        steps = engine._programs._steps
        programs = {**getattr(steps, "_layer", {}), **getattr(steps, "_step", {})}
        sizes = [one.memory_analysis().temp_size_in_bytes for one in programs.values()]
        assert max(sizes) < least / 2
    finally:
        engine.close()


def test_no_product_of_float32_is_computed_in_fewer_bits(made: JaxEngine) -> None:
    """A GPU would take TF32, which has 10 bits of fraction, unless each product says otherwise."""
    steps = made._programs._steps
    programs = [*getattr(steps, "_layer", {}).values(), *getattr(steps, "_step", {}).values()]
    for program in [*programs, *made._programs._head.values()]:
        products = [line for line in program.as_text().splitlines() if " dot(" in line]
        assert products
        assert all("operand_precision={highest,highest}" in line for line in products)


@pytest.mark.parametrize("argmax", ["host", "device"])
def test_numbers_that_are_not_finite_fail_their_sequence_alone(argmax: str) -> None:
    """A sequence whose cache is spoiled fails; the next owner of its pages is not harmed."""
    engine = make(kv_tokens=128, extra=(("argmax", argmax),))
    prompts = prompts_of(engine)
    try:
        expected = generate(engine, 1, prompts[1], 5)
        engine.reset()
        engine.step(Plan(admits=[admit(1, prompts[0])], work=[(1, len(prompts[0]))]))
        caches = engine._programs._arrays.caches
        caches[0] = jax.device_put(caches[0].at[1:].set(np.nan), caches[0].sharding)
        work = [(1, 1), (2, len(prompts[1]))]
        outcome = engine.step(Plan(admits=[admit(2, prompts[1])], work=work))
        assert outcome.failures == {1: "the engine's logits are not finite numbers"}
        assert outcome.sequences == [2]
        assert outcome.tokens + decode(engine, 2, 2) == expected[:3]
        engine.step(Plan(drops=[1, 2]))
        assert generate(engine, 3, prompts[1], 5) == expected
    finally:
        engine.close()


def test_the_cache_leaves_room_for_programs() -> None:
    gib = 1 << 30
    assert cache_share(40 * gib) == 34 * gib
    assert cache_share(4 * gib) == 3 * gib
    assert cache_share(gib // 2) == 0


def test_without_a_size_the_cache_follows_this_ranks_part_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []
    for mib in (64, 32):
        monkeypatch.setattr("shards.engines.jax_engine.memory_bytes", lambda mib=mib: mib << 20)
        engine = make(kv_tokens=0, sequences_max=1)
        sizes.append(engine.describe().kv_tokens)
        engine.close()
    assert sizes[0] // 16 * 8 == sizes[1] > 0  # in whole pages of 8


def test_loading_reports_progress() -> None:
    seen: list[float] = []
    load("jax", options(sequences_max=1), seen.append).close()
    assert seen == sorted(seen)
    assert len(seen) > 5
    assert seen[-1] == 1.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": None}, "--model PATH is missing"),
        ({"dtype": "int4"}, "--dtype int4 is not one of float32, bfloat16"),
        ({"device": "abacus"}, "--device abacus is not one of cpu"),
        ({"device": "cpu:9"}, "there is no device cpu:9, only 1"),
        ({"world": 2, "rendezvous": "localhost:1"}, "--num-shard can be 1"),
        ({"world": 2}, "need --rendezvous"),
        ({"extra": (("attention", "kernel"),)}, "needs a TPU"),
        ({"extra": (("program", "loop"),)}, "program=loop is not one of layer, step"),
        ({"extra": (("colour", "red"),)}, "unknown engine option colour"),
        ({"kv_tokens": 5}, "less than a page of 8"),
        ({"adapters": (("a", tiny_llama_folder()),)}, "LoRA adapters are not supported"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(changes: dict[str, object], reason: str) -> None:
    if "--num-shard" in reason:
        changes = {**changes, "model": tiny_llama_folder(heads=3, kv_heads=1)}
    with pytest.raises(ModelError, match=reason) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)
