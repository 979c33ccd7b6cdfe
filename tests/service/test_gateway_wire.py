"""What router and gateway tell each other comes out as it went in."""

from dataclasses import fields

import pytest

from router.config import GroupSpec, Settings
from router.core.events import Limits, Reason, Submitted
from router.fleet import GroupCard
from router.gateway_wire import (
    LIMITS,
    REASON_TO_WIRE,
    card_from_wire,
    fleet_to_wire,
    limits_from_wire,
    limits_to_wire,
    reason_of_wire,
    specs_from_wire,
    submit_to_wire,
    submitted_of,
    unknown_to,
)
from router.v1 import gateway_pb2 as pb
from shards.v1.shard_pb2 import Constraint, Sampling

OF_A_PROCESS = {
    *("host", "port", "grpc_port", "api_key", "cors_allow_origin", "json_output", "log_level"),
    *("tls_cert", "tls_key", "tls_client_ca", "cluster_ca", "cluster_cert", "cluster_key"),
    *("graceful_termination_timeout_s", "otlp_endpoint", "otlp_service_name"),
}
"""What a gateway has settings of its own for."""
OF_THE_ROUTER = {
    *("plans_in_flight_max", "step_deadline_s", "attempts_max"),
    *("resume_streams", "resume_timeout_s", "cluster_port"),
}
"""What concerns requests only behind the driver."""

CARD = GroupCard(
    name="g",
    model="m",
    engine="scripted",
    engine_version="1.2",
    device="cpu",
    dtype="f32",
    scheduling="caller",
    world=2,
    limits=Limits(4096, 16, 8, 512, 200, shares_prefix=True, donor_tokens_max=77),
    features=("logprobs", "seed"),
    eos_token_ids=(2, 5),
    vocab_size=300,
    tokenizer_sha256="ab",
    instances=("i", "j"),
    load_seconds=1.5,
    weight_bytes=2**40,
    warnings=("slow",),
    ready=False,
    adapters=("verse",),
    embed_tokens_max=99,
)


def test_every_setting_is_told_or_belongs_to_one_side() -> None:
    known = {*LIMITS, *OF_A_PROCESS, *OF_THE_ROUTER}
    assert {field.name for field in fields(Settings)} == known
    assert len(known) == len(LIMITS) + len(OF_A_PROCESS) + len(OF_THE_ROUTER)


def test_the_routers_limits_take_the_place_of_a_gateways() -> None:
    told = Settings(
        max_concurrent_requests=7,
        max_top_n_tokens=0,
        max_total_tokens=99,
        request_deadline_s=2.5,
        payload_limit=1000,
        port=1,
        api_key="router's",
    )
    own = Settings(max_input_tokens=5, port=2, api_key="gateway's")
    wire = pb.Limits.FromString(limits_to_wire(told).SerializeToString())
    got = limits_from_wire(wire, own)
    for name in LIMITS:
        assert getattr(got, name) == getattr(told, name), name
    assert got.max_input_tokens is None
    assert (got.port, got.api_key) == (2, "gateway's")


OLDER = bytes.fromhex("080710021804200528e80738802051333333333333d33f5814600468c0843d7800")
"""The limits of a router from before watermarks: 7 requests, 1000 input tokens, 1 MB."""


def test_an_older_router_does_not_tell_what_it_does_not_know() -> None:
    wire = pb.Limits.FromString(OLDER)
    got = limits_from_wire(wire, Settings(max_total_tokens=5, watermark_delta=9.0))
    assert (got.max_concurrent_requests, got.max_input_tokens) == (7, 1000)
    assert got.payload_limit == 1_000_000
    assert got.max_total_tokens is None
    assert got.watermark_delta == Settings().watermark_delta
    assert unknown_to(wire) == {"watermark"}
    assert unknown_to(limits_to_wire(Settings())) == frozenset()
    (group,) = fleet_to_wire([(GroupSpec("g", "m", ()), CARD)]).groups
    assert card_from_wire("g", group.card, frozenset({"seed"})).features == ("logprobs",)


@pytest.mark.parametrize("kept", [77, None])
def test_a_groups_card_survives(kept: int | None) -> None:
    limits = Limits(4096, 16, 8, 512, 200, shares_prefix=True, donor_tokens_max=kept)
    values = {field.name: getattr(CARD, field.name) for field in fields(CARD)}
    defaults = {field.name: field.default for field in fields(CARD)}
    assert [name for name in values if values[name] == defaults[name]] == []
    card = GroupCard(**{**values, "limits": limits})
    specs = [(GroupSpec("g", "m", ("unix:///x",)), card), (GroupSpec("h", None, ("a:1",)), None)]
    wire = pb.Fleet.FromString(fleet_to_wire(specs).SerializeToString())
    assert specs_from_wire(wire) == (GroupSpec("g", "m", ()), GroupSpec("h", None, ()))
    assert [group.HasField("card") for group in wire.groups] == [True, False]
    assert [fleet_to_wire(specs, expecting=one).expecting for one in (False, True)] == [False, True]
    assert card_from_wire("g", wire.groups[0].card) == card


def test_a_submission_survives_with_a_deadline_by_the_other_clock() -> None:
    sampling = Sampling(temperature=0.5, seed=9, constraint=Constraint(regex="a+"))
    given = Submitted(
        request=3,
        model="m",
        prompt=(1, 2, 3),
        max_tokens=9,
        stop_tokens=frozenset({7, 4}),
        needs=("seed", "grammar"),
        priority=2,
        deadline_ms=1_500,
        sampling=sampling,
        adapter="verse",
    )
    wire = pb.Submit.FromString(submit_to_wire(given, now_ms=1_000).SerializeToString())
    got = submitted_of(wire, request=8, model="m", now_ms=50_000)
    for field in fields(Submitted):
        expected = {"request": 8, "deadline_ms": 50_500}.get(field.name, getattr(given, field.name))
        assert getattr(got, field.name) == expected, field.name
    late = submit_to_wire(given, now_ms=2_000)
    assert submitted_of(late, 8, "m", 0).deadline_ms == 1
    never = Submitted(request=3, model="m", prompt=(1,), max_tokens=1, sampling=sampling)
    assert submitted_of(submit_to_wire(never, 5), 8, "m", 5).deadline_ms is None


def test_every_reason_has_its_number_and_an_unknown_one_is_a_failure() -> None:
    assert {reason_of_wire(REASON_TO_WIRE[reason]) for reason in Reason} == set(Reason)
    assert reason_of_wire(999) is Reason.ENGINE_FAILED
