"""What users may know of models and groups, from what workers say of themselves."""

from typing import Any

import pytest

from router.config import GroupSpec, Settings
from router.described import card_of
from router.errors import Fault, RequestError
from router.fleet import Fleet, GroupCard, MismatchError
from router.text.tokenizer import Tokenizer
from shards.engines.scripted_text import Script
from shards.v1 import shard_pb2

SPEC = GroupSpec("g", None, ("unix:///a",))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_files(Script().files())


def said(**changes: Any) -> shard_pb2.DescribeResponse:
    facts: dict[str, Any] = {
        "engine": "scripted",
        "model_id": "m",
        "scheduling": shard_pb2.SCHEDULING_KIND_CALLER,
        "world": 1,
        "kv_tokens": 1000,
        "page_tokens": 16,
        "sequences_max": 8,
        "step_tokens_max": 64,
        "length_max": 500,
        "vocab_size": 300,
        "features": ["prefix_sharing", "seed"],
        "instance_id": f"rank {changes.get('rank', 0)}",
        "tokenizer_sha256": "00",
        "eos_token_ids": [2],
    }
    return shard_pb2.DescribeResponse(**(facts | changes))


def card(name: str = "g", **changes: Any) -> GroupCard:
    changes.setdefault("instance_id", name)
    return card_of(GroupSpec(name, None, ("unix:///a",)), [said(**changes)])


def test_a_group_is_what_all_its_ranks_can_do() -> None:
    joined = card_of(
        SPEC,
        [
            said(rank=1, world=2, kv_tokens=900, load_seconds=2.0, weight_bytes=10),
            said(
                rank=0,
                world=2,
                sequences_max=7,
                step_tokens_max=60,
                features=["seed"],
                load_seconds=3.0,
                weight_bytes=11,
                warnings=["slow"],
            ),
        ],
    )
    limits = joined.limits
    assert (limits.kv_tokens, limits.sequences_max, limits.step_tokens_max) == (900, 7, 60)
    assert not limits.shares_prefix
    assert joined.features == ("seed",)
    assert joined.instances == ("rank 0", "rank 1")
    assert (joined.load_seconds, joined.weight_bytes, joined.warnings) == (3.0, 21, ("slow",))
    assert (joined.scheduling, joined.world) == ("caller", 2)


@pytest.mark.parametrize(
    ("ranks", "cause"),
    [
        ([said(world=2)], "1 workers were given, but they are rank 0 of 2"),
        ([said(world=2), said(world=2)], "each rank is needed once"),
        ([said(world=2), said(rank=1, world=2, model_id="n")], "differ in model_id: m, n"),
        ([said(world=2), said(rank=1, world=2, tokenizer_sha256="1")], "differ in tokenizer"),
        ([said(world=2), said(rank=1, world=2, page_tokens=8)], "differ in page_tokens"),
        ([said(kv_tokens=0)], "kv_tokens = 0"),
        ([said(sequences_max=0)], "sequences_max = 0"),
        ([said(kv_tokens=15)], "kv_tokens < page_tokens"),
    ],
)
def test_ranks_that_do_not_belong_together(
    ranks: list[shard_pb2.DescribeResponse], cause: str
) -> None:
    with pytest.raises(MismatchError, match=cause):
        card_of(SPEC, ranks)


@pytest.mark.parametrize(
    ("settings", "limits", "expected"),
    [
        (Settings(), {}, (499, 500)),
        (Settings(), {"length_max": 5000}, (991, 992)),  # whole pages of the KV cache
        (Settings(max_batch_total_tokens=100), {}, (95, 96)),
        (Settings(max_total_tokens=50), {}, (49, 50)),
        (Settings(max_total_tokens=50_000), {}, (499, 500)),
        (Settings(max_input_tokens=30), {}, (30, 500)),
        (Settings(max_input_tokens=3000), {}, (499, 500)),
    ],
)
def test_the_longest_request(
    tokenizer: Tokenizer,
    settings: Settings,
    limits: dict[str, int],
    expected: tuple[int, int],
) -> None:
    fleet = Fleet(settings, [SPEC])
    fleet.up(card(**limits), tokenizer)
    model = fleet.model("m")
    assert (model.max_input_tokens, model.max_total_tokens) == expected


def test_before_any_worker_has_come_up_there_is_no_model() -> None:
    fleet = Fleet(Settings(), [SPEC])
    for name in (None, "m"):
        with pytest.raises(RequestError) as refusal:
            fleet.model(name)
        assert refusal.value.fault is Fault.UNAVAILABLE
    assert fleet.models() == ()
    assert fleet.groups_up() == {"g": False}


async def test_models_by_name(tokenizer: Tokenizer) -> None:
    specs = [SPEC, GroupSpec("h", None, ("unix:///b",)), GroupSpec("i", "late", ("unix:///c",))]
    fleet = Fleet(Settings(), specs)
    fleet.up(card("h", model_id="n"), tokenizer)
    await fleet.wait_ready()
    assert fleet.model(None).id == "n"
    fleet.up(card("g"), tokenizer)
    assert [model.id for model in fleet.models()] == ["m", "n"]
    for name in (None, "", "tgi", "dummy", "m"):
        assert fleet.model(name).id == "m"
    with pytest.raises(RequestError, match="there is: m, n") as refusal:
        fleet.model("x")
    assert (refusal.value.fault, refusal.value.field) == (Fault.MODEL_NOT_FOUND, "model")
    with pytest.raises(RequestError) as refusal:
        fleet.model("late")
    assert refusal.value.fault is Fault.UNAVAILABLE


def test_a_model_stays_known_when_its_workers_are_down(tokenizer: Tokenizer) -> None:
    fleet = Fleet(Settings(), [SPEC])
    fleet.up(card(), tokenizer)
    fleet.down("g")
    assert fleet.model("m").max_total_tokens == 500
    assert not fleet.model("m").groups[0].ready
    assert fleet.tokenizer("00") is tokenizer
    assert fleet.tokenizer("01") is None


def test_a_model_can_do_what_one_of_its_groups_can(tokenizer: Tokenizer) -> None:
    fleet = Fleet(Settings(), [SPEC, GroupSpec("h", None, ("unix:///b",))])
    fleet.up(card("g", features=["seed"]), tokenizer)
    fleet.up(card("h", features=["logprobs"]), tokenizer)
    assert fleet.model("m").features == ("logprobs", "seed")


def test_a_worker_is_claimed_by_one_group_at_a_time() -> None:
    fleet = Fleet(Settings(), [SPEC])
    first, twin = card("g", instance_id="x"), card("h", instance_id="x")
    error = pytest.raises(MismatchError, match="already serves group g")
    with fleet.claim(first), error, fleet.claim(twin):
        pass
    with fleet.claim(twin):
        pass
