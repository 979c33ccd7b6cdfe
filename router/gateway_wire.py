"""Between the messages of ``router.v1.Gateway`` and the router's own types, for both its ends."""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, cast

from router.config import GroupSpec, Settings
from router.core.events import Limits, Reason, Submitted
from router.errors import Fault
from router.fleet import GroupCard
from router.v1 import gateway_pb2 as pb
from shards.v1.shard_pb2 import Sampling

PROTOCOL = 1
"""Which rules of ``router/v1/gateway.proto`` these are."""
SERVICE = "router.v1.Gateway"
MESSAGE_BYTES_MAX = 16 * 2**20
"""What a gateway may send at once: a prompt of a million tokens takes 3 to 4 MiB."""
TOKENIZER_PIECE_BYTES = 2**20

LIMITS = tuple(field.name for field in pb.Limits.DESCRIPTOR.fields)
"""The settings that a router tells its gateways; all others are of a process."""
_DEFAULTS = {field.name: field.default for field in fields(Settings)}
_FEATURE_OF = dict.fromkeys(("watermark_gamma", "watermark_delta", "watermark_key"), "watermark")
"""Limits that came with a feature. The first routers that took gateways knew all others."""

REASON_TO_WIRE: dict[Reason, pb.EndReason] = {
    reason: cast(pb.EndReason, pb.EndReason.Value(f"END_REASON_{reason.name}")) for reason in Reason
}
_REASON_OF_WIRE: dict[int, Reason] = {number: reason for reason, number in REASON_TO_WIRE.items()}

REASON_OF_FAULT = {
    Fault.VALIDATION: Reason.TOO_LONG,
    Fault.UNSUPPORTED: Reason.UNSUPPORTED,
    Fault.MODEL_NOT_FOUND: Reason.UNSUPPORTED,
    Fault.OVERLOADED: Reason.OVERLOADED,
    Fault.UNAVAILABLE: Reason.SHUTDOWN,
}
"""How a router's refusal of a request that its gateway let pass looks to the gateway."""

_HELD = tuple(field.name for field in fields(Limits))
_SAID = tuple(field.name for field in fields(GroupCard) if field.name not in ("name", "limits"))


def reason_of_wire(number: int) -> Reason:
    """The reason; what this side does not know is a failure."""
    return _REASON_OF_WIRE.get(number, Reason.ENGINE_FAILED)


def limits_to_wire(settings: Settings) -> pb.Limits:
    """What the router allows."""
    given = {name: getattr(settings, name) for name in LIMITS}
    return pb.Limits(**{name: value for name, value in given.items() if value is not None})


def limits_from_wire(limits: pb.Limits, own: Settings) -> Settings:
    """A gateway's own settings, with the router's limits.

    One that a router is too old to tell is the default; see ``unknown_to``. Raises ``ConfigError``
    if they cannot work.
    """
    given: dict[str, Any] = {
        name: getattr(limits, name) if limits.HasField(name) else _DEFAULTS[name] for name in LIMITS
    }
    return replace(own, **given)


def unknown_to(limits: pb.Limits) -> frozenset[str]:
    """Features that a router is too old to know: it does not tell what they are limited to."""
    return frozenset(feature for name, feature in _FEATURE_OF.items() if not limits.HasField(name))


def fleet_to_wire(
    groups: Iterable[tuple[GroupSpec, GroupCard | None]], *, expecting: bool = False
) -> pb.Fleet:
    """All configured groups, what is known of each, and whether one is coming for ended ones."""
    return pb.Fleet(
        expecting=expecting,
        groups=[
            pb.FleetGroup(
                name=spec.name,
                model=spec.model or "",
                card=None if card is None else _card_to_wire(card),
            )
            for spec, card in groups
        ],
    )


def _card_to_wire(card: GroupCard) -> pb.FleetCard:
    said = {name: getattr(card, name) for name in _SAID}
    held = {name: getattr(card.limits, name) for name in _HELD}
    return pb.FleetCard(
        **said, **{name: value for name, value in held.items() if value is not None}
    )


def specs_from_wire(fleet: pb.Fleet) -> tuple[GroupSpec, ...]:
    """The configured groups; where their workers are is the router's business."""
    return tuple(GroupSpec(group.name, group.model or None, ()) for group in fleet.groups)


def card_from_wire(
    name: str, card: pb.FleetCard, withheld: frozenset[str] = frozenset()
) -> GroupCard:
    """What the ranks of a group have said, without the features that are ``withheld``."""
    said = {field: _plain(getattr(card, field)) for field in _SAID}
    said["features"] = tuple(one for one in card.features if one not in withheld)
    held = {field: getattr(card, field) for field in _HELD}
    if not card.HasField("donor_tokens_max"):
        held["donor_tokens_max"] = None
    return GroupCard(name=name, limits=Limits(**held), **said)


def _plain(value: Any) -> Any:
    """A tuple for a repeated field; anything else as it is."""
    return value if isinstance(value, bool | int | float | str) else tuple(value)


def submit_to_wire(submitted: Submitted, now_ms: int) -> pb.Submit:
    """A request on its way to the router; its deadline is relative from now on."""
    left_ms = 0 if submitted.deadline_ms is None else max(1, submitted.deadline_ms - now_ms)
    return pb.Submit(
        request=submitted.request,
        model=submitted.model,
        prompt=submitted.prompt,
        max_tokens=submitted.max_tokens,
        stop_tokens=sorted(submitted.stop_tokens),
        needs=submitted.needs,
        priority=submitted.priority,
        deadline_ms=left_ms,
        sampling=cast(Sampling, submitted.sampling),
        adapter=submitted.adapter,
    )


def submitted_of(
    wire: pb.Submit, request: int, model: str, now_ms: int, *, alone: bool = False
) -> Submitted:
    """A request as the core knows it, by the router's number.

    ``alone``: its message has nothing else in it, which its sampling, a part of it, would keep.
    """
    sampling = wire.sampling
    if not alone:
        sampling = Sampling()
        sampling.CopyFrom(wire.sampling)
    return Submitted(
        request=request,
        model=model,
        prompt=tuple(wire.prompt),
        max_tokens=wire.max_tokens,
        stop_tokens=frozenset(wire.stop_tokens),
        needs=tuple(wire.needs),
        priority=wire.priority,
        deadline_ms=now_ms + wire.deadline_ms if wire.deadline_ms else None,
        sampling=sampling,
        adapter=wire.adapter,
    )
