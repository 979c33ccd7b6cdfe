"""Who shares what with whom: that nobody shares less than it could, or what is not the same."""

from collections.abc import Sequence as Seq

from router.core.effects import RunPlan
from router.core.events import PROMPT_LOGPROBS
from router.core.state import Group, Sequence
from tests.sim.books import Books
from tests.sim.turn import Turn, account_of
from tests.sim.worker import ensure


def count_shares(books: Books, plan: RunPlan) -> None:
    """Counts the kinds of shares that there are."""
    for admit in plan.admits:
        if admit.share_len:
            source = books.requests[admit.share_from]
            ensure(not source.failed, "a share of a sequence that is known to have failed")
            books.seen["share from running" if source.open else "share from finished"] += 1
            books.seen["share after a loss"] += len(admit.tokens) > admit.prompt_len
            books.seen["share of an answer"] += admit.share_len > len(source.facts.prompt)
            books.seen["share with an adapter"] += bool(admit.adapter)
            books.seen["share from a scored prompt"] += source.scores_prompt


def check_sharing(books: Books, group: Group, before: Turn) -> None:
    """Whoever was placed shares as much as one of those who stay has, and that one counts as used.

    Only beside others that run: for the sake of the only one, what it was to share is given up.
    """
    members = group.members()
    placed = [member for member in members if before.places.get(member.id) is not group]
    new = {member.id for member in placed} - group.donors.keys()
    if len(new) == group.running or not group.up.limits.shares_prefix:
        return
    for member in placed:
        if member.id not in new or scores(member):
            continue
        known = {m.id: known_of(group, m) for m in members if _alike(m, member)}
        share = _share(books, member)
        others = {number: common(known[number], member.tokens) for number in known.keys() - new}
        most = max(others.values(), default=0)
        best = group.ledger.whole_pages(min(most, len(member.tokens) - 1))
        ensure(share >= best or best < books.config.share_tokens_min, f"{member.id} shares less")
        donors = [
            number
            for number in known
            if number != member.id and 0 < share <= common(known[number], member.tokens)
        ]
        scarce = group.up.limits.donor_tokens_max is not None
        if len(donors) == 1 and donors[0] in group.donors and not scarce:
            after = list(group.donors)[list(group.donors).index(donors[0]) + 1 :]
            used = all(shared_now(books, group, donor, before) for donor in after)
            ensure(used, f"donor {donors[0]} was used, and does not count as used")


def known_of(group: Group, member: Sequence) -> Seq[int]:
    """What others can count on: the prompt of one who runs, and what a donor has computed."""
    return member.tokens[: member.scheduled] if member.id in group.donors else member.facts.prompt


def _alike(member: Sequence, other: Sequence) -> bool:
    """Whether both are computed with the same adapter, so that they could share."""
    return member.facts.adapter == other.facts.adapter


def scores(member: Sequence) -> bool:
    """Whether all of its prompt has to be computed."""
    return PROMPT_LOGPROBS in member.facts.needs


def _share(books: Books, member: Sequence) -> int:
    """How much it started with. As an heir, it owns that by now and its account shares less."""
    return books.requests[member.id].shared if member.admitted else account_of(member).share_len


def common(known: Seq[int], tokens: Seq[int]) -> int:
    """How many tokens two lists begin with in common."""
    pairs = zip(known, tokens, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(known), len(tokens)))


def shared_now(books: Books, group: Group, donor: int, before: Turn) -> bool:
    """Whether somebody placed in this turn begins with tokens that the donor has."""
    known = known_of(group, group.donors[donor])
    return any(
        before.places.get(member.id) is not group
        and _alike(member, group.donors[donor])
        and (share := _share(books, member)) > 0
        and known[:share] == member.tokens[:share]
        for member in (*group.filling.values(), *group.decoding.values())
    )
