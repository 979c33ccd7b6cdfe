"""What a simulated world is like, drawn from its seed: limits, groups, clients and faults.

Swarm style: each fault class is absent from half of the worlds and has a random rate in the others,
so that no fault hides behind another (Groce et al., "Swarm Testing", ISSTA 2012). Memory is tight
and prompts share beginnings in most worlds, so that eviction and preemption are common.
"""

from dataclasses import dataclass, replace
from random import Random

from router.core.events import PROMPT_LOGPROBS, Limits, Submitted
from router.core.state import CoreConfig
from tests.sim.worker import END_TOKEN, TOKENS, Wish

FEATURES = ("grammar", "logprobs")
ADAPTERS = ("prose", "verse")


@dataclass(slots=True)
class Faults:
    """Rates, from 0 to 1: per group, step or request, as the names say."""

    crash_per_group: float
    wedge_per_step: float
    untrue_per_step: float
    stale_per_step: float
    failure_per_token: float
    cancel_per_request: float
    stop_string_per_request: float
    deadline_per_request: float
    oversized_per_request: float
    needs_per_request: float
    strange_adapter_per_request: float = 0.0


NO_FAULTS = Faults(*([0.0] * 10))


@dataclass(slots=True)
class GroupSpec:
    """A group; ``limits`` may change from one life to the next.

    One that is ``late`` tells the log probabilities of a prompt when all of it is computed.
    """

    name: str
    model: int
    limits: Limits
    features: tuple[str, ...]
    step_ms_max: int
    adapters: tuple[str, ...] = ()
    late: bool = False


@dataclass(slots=True)
class World:
    """All that is fixed before a world begins.

    ``adapted`` is the share of requests that ask for one of the adapters, ``scored`` of those that
    want the log probabilities of their prompts. In an ``uneven`` one a group can do what others
    cannot, and is often away.
    """

    config: CoreConfig
    groups: list[GroupSpec]
    models: int
    faults: Faults
    requests: int
    spread_ms: int
    stems: list[tuple[int, ...]]
    whole_stem: float
    same: float
    answer_max: int
    priorities: int
    follow_up: float
    logprobs: bool
    down_ms_max: int
    resizes: bool
    adapted: float = 0.0
    scored: float = 0.0
    uneven: bool = False


def draw_world(rng: Random) -> World:
    """A world."""
    models = 1 if rng.random() < 0.7 else 2
    page = rng.choice((1, 1, 2, 4, 8))
    kv_scale = rng.choice((40, 64, 64, 120))
    count = rng.choice((1, 1, 2, 3)) if models == 1 else rng.choice((2, 3))
    features = rng.random() < 0.4
    groups = [
        GroupSpec(
            f"g{index}",
            index % models,
            draw_limits(rng, page, kv_scale),
            _some(rng, FEATURES) if features else FEATURES,
            rng.choice((2, 10, 40)),
        )
        for index in range(count)
    ]
    stem_max = rng.choice((4, 12, 30))
    world = World(
        config=_config(rng, page),
        groups=groups,
        models=models,
        faults=_faults(rng),
        requests=rng.randint(8, 26),
        spread_ms=rng.choice((1, 60, 250)),
        stems=[draw_tokens(rng, rng.randint(2, stem_max)) for _ in range(rng.randint(1, 4))],
        same=rng.choice((0.0, 0.5)),
        whole_stem=rng.choice((0.2, 0.8, 1.0)),
        answer_max=rng.choice((3, 12, 24)),
        priorities=rng.choice((1, 1, 3)),
        follow_up=rng.choice((0.0, 0.4, 0.8)),
        logprobs=rng.random() < 0.5,
        down_ms_max=rng.choice((5, 40)),
        resizes=rng.random() < 0.3,
    )
    return _crowded(world) if rng.random() < 0.05 else world


def _crowded(world: World) -> World:
    """The same, but a crowd comes at once, and most of it leaves at once."""
    world.config = replace(world.config, requests_max=100)
    world.faults.cancel_per_request = 0.95
    world.requests, world.spread_ms = 60, 1
    return world


def draw_limits(rng: Random, page: int, kv_scale: int) -> Limits:
    """What one life of a group can hold and do."""
    kv_tokens = max(page, rng.randint(kv_scale // 2, kv_scale))
    return Limits(
        kv_tokens=kv_tokens,
        page_tokens=page,
        sequences_max=rng.choice((1, 2, 4, 6, 10)),
        step_tokens_max=rng.choice((1, 3, 8, 24)),
        length_max=rng.choice((kv_tokens, kv_tokens * 2, kv_tokens * 3 // 4 + 1)),
        shares_prefix=rng.random() < 0.85,
        donor_tokens_max=rng.choice((None, None, 0, 8, 40)),
    )


def draw_tokens(rng: Random, count: int) -> tuple[int, ...]:
    """Text."""
    return tuple(rng.randrange(TOKENS) for _ in range(count))


def draw_prompt(rng: Random, world: World) -> tuple[int, ...]:
    """A prompt: the start of one of the stems, and a few tokens of its own."""
    stem = rng.choice(world.stems)
    if rng.random() < world.same:
        return stem
    if rng.random() >= world.whole_stem:
        stem = stem[: rng.randint(0, len(stem))]
    return stem + draw_tokens(rng, rng.randint(0 if stem else 1, 4))


def draw_request(rng: Random, world: World, rates: Faults, now: int) -> Submitted:
    """What a client asks for, but for its number, model and prompt."""
    answer = rng.randint(1, world.answer_max)
    deadline = None
    if rng.random() < rates.oversized_per_request:
        answer = 500
    if rng.random() < rates.deadline_per_request:
        deadline = now + rng.choice((0, 5, 30, 100, 250))
    return Submitted(
        request=0,
        model="",
        prompt=(),
        max_tokens=answer,
        stop_tokens=_stops(rng),
        needs=tuple(need for need in FEATURES if rng.random() < rates.needs_per_request),
        priority=rng.randrange(world.priorities),
        deadline_ms=deadline,
        sampling=Wish(),
    )


def add_adapters(rng: Random, world: World) -> None:
    """Gives the groups adapters, and the requests of some worlds a wish for them."""
    world.adapted = rng.choice((0.0, 0.0, 0.3, 0.6))
    uneven = rng.random() < 0.4
    for group in world.groups:
        group.adapters = _some(rng, ADAPTERS) if uneven else ADAPTERS
    if world.adapted and rng.random() < 0.5:
        world.faults.strange_adapter_per_request = 0.2 * rng.random()


def draw_adapter(rng: Random, world: World, rates: Faults, before: str | None) -> str:
    """The model itself, one of the adapters, or one that no group has."""
    if before is not None and rng.random() < 0.9:
        return before
    if rng.random() < rates.strange_adapter_per_request:
        return "nobody's"
    return rng.choice(ADAPTERS) if rng.random() < world.adapted else ""


def add_scores(rng: Random, world: World) -> None:
    """Lets groups score prompts, and the requests of some worlds ask for it."""
    world.scored = rng.choice((0.0, 0.0, 0.2, 0.6))
    uneven = rng.random() < 0.3
    for group in world.groups:
        group.late = rng.random() < 0.3
        if not uneven or rng.random() < 0.6:
            group.features = (*group.features, PROMPT_LOGPROBS)


def ask_scores(rng: Random, world: World, ask: Submitted) -> Submitted:
    """The request, perhaps with a wish for the log probabilities of its prompt."""
    if rng.random() >= world.scored:
        return ask
    return replace(ask, needs=(*ask.needs, PROMPT_LOGPROBS), sampling=Wish(scores_prompt=True))


def _stops(rng: Random) -> frozenset[int]:
    """Stop tokens: usually the model's own; none; or one more."""
    drawn = rng.random()
    if drawn < 0.7:
        return frozenset({END_TOKEN})
    return frozenset() if drawn < 0.9 else frozenset({END_TOKEN, 1})


def _config(rng: Random, page: int) -> CoreConfig:
    return CoreConfig(
        requests_max=rng.choice((4, 12, 40, 60)),
        step_tokens_max=rng.choice((None, None, 2, 6)),
        kv_tokens_max=rng.choice((None, None, max(page, 20))),
        sequences_max=rng.choice((None, None, 2, 4)),
        plans_in_flight_max=rng.choice((1, 2, 2, 3)),
        step_deadline_ms=rng.choice((60, 200)),
        attempts_max=rng.choice((1, 2, 3)),
        resume_streams=rng.random() < 0.6,
        reserve_tokens=rng.choice((0, 1, 3, 8)),
        share_tokens_min=rng.choice((1, 2, 6)),
        head_start_ms=rng.choice((0, 20, 500)),
    )


def _faults(rng: Random) -> Faults:
    def rate(most: float) -> float:
        return most * rng.random() if rng.random() < 0.5 else 0.0

    return Faults(
        crash_per_group=rate(3.0),
        wedge_per_step=rate(0.03),
        untrue_per_step=rate(0.05),
        stale_per_step=rate(0.1),
        failure_per_token=rate(0.04),
        cancel_per_request=rate(0.5),
        stop_string_per_request=rate(0.5),
        deadline_per_request=rate(0.5),
        oversized_per_request=rate(0.15),
        needs_per_request=rate(0.6),
        strange_adapter_per_request=rate(0.1),
    )


def _some(rng: Random, choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(choice for choice in choices if rng.random() < 0.6)
