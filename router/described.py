"""What the ranks of a group say of themselves, joined into one description."""

from collections.abc import Sequence

from router.config import GroupSpec
from router.core.events import Limits
from router.fleet import GroupCard, MismatchError
from shards.v1.shard_pb2 import DescribeResponse, SchedulingKind


def card_of(spec: GroupSpec, described: Sequence[DescribeResponse]) -> GroupCard:
    """Joins what the ranks of a group say of themselves.

    Raises ``MismatchError`` unless they are each rank of one model once, and can hold anything.
    """
    ranks = sorted(described, key=lambda one: one.rank)
    first = ranks[0]
    if any(one.world != len(ranks) for one in ranks):
        worlds = ", ".join(f"{one.rank} of {one.world}" for one in ranks)
        raise MismatchError(f"{len(ranks)} workers were given, but they are rank {worlds}")
    if [one.rank for one in ranks] != list(range(len(ranks))):
        numbers = ", ".join(str(one.rank) for one in ranks)
        raise MismatchError(f"each rank is needed once, but the workers are rank {numbers}")
    for name in ("model_id", "engine", "dtype", "vocab_size", "tokenizer_sha256", "scheduling"):
        values = list(dict.fromkeys(getattr(one, name) for one in ranks))
        if len(values) > 1:
            raise MismatchError(f"the ranks differ in {name}: {', '.join(map(str, values))}")
    adapters = tuple(first.adapters)
    if any(set(one.adapters) != set(adapters) for one in ranks):
        raise MismatchError("the ranks differ in their adapters")
    model = spec.model or first.model_id
    if model in adapters:
        raise MismatchError(f"an adapter is called {model}, as the model is: give it another name")
    features = set.intersection(*(set(one.features) for one in ranks))
    if len(ranks) > 1:
        # An embedding is no part of the log, without which the ranks do nothing together.
        features -= {"embeddings"}
    return GroupCard(
        name=spec.name,
        model=model,
        engine=first.engine,
        engine_version=first.engine_version,
        device=first.device,
        dtype=first.dtype,
        scheduling=SchedulingKind.Name(first.scheduling).removeprefix("SCHEDULING_KIND_").lower(),
        world=len(ranks),
        limits=_limits(ranks),
        features=tuple(sorted(features)),
        eos_token_ids=tuple(first.eos_token_ids),
        vocab_size=first.vocab_size,
        tokenizer_sha256=first.tokenizer_sha256,
        instances=tuple(one.instance_id for one in ranks),
        load_seconds=max(one.load_seconds for one in ranks),
        weight_bytes=sum(one.weight_bytes for one in ranks),
        warnings=tuple(dict.fromkeys(text for one in ranks for text in one.warnings)),
        adapters=adapters,
        embed_tokens_max=first.embed_tokens_max if "embeddings" in features else 0,
    )


def _limits(ranks: Sequence[DescribeResponse]) -> Limits:
    """The smallest of the ranks' limits; pages are of one size."""
    pages = {one.page_tokens for one in ranks}
    if len(pages) > 1:
        raise MismatchError(f"the ranks differ in page_tokens: {sorted(pages)}")
    least = {
        name: min(getattr(one, name) for one in ranks)
        for name in ("kv_tokens", "page_tokens", "sequences_max", "step_tokens_max", "length_max")
    }
    for name, value in least.items():
        if value < 1:
            raise MismatchError(f"a worker says {name} = {value}, so it can hold nothing")
    if least["kv_tokens"] < least["page_tokens"]:
        raise MismatchError("a worker says kv_tokens < page_tokens, so it can hold nothing")
    shares = all("prefix_sharing" in one.features for one in ranks)
    kept = [one.donor_tokens_max for one in ranks if one.donor_tokens_max]
    return Limits(**least, shares_prefix=shares, donor_tokens_max=min(kept, default=None))
