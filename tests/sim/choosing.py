"""What must hold of the choice among groups: most of the prompt first, then most room."""

from router.core.scheduler import Core
from router.core.state import Group, Sequence
from tests.sim.books import Books, Request
from tests.sim.checks import has_room
from tests.sim.sharing import common, known_of
from tests.sim.turn import Turn, account_of
from tests.sim.worker import ensure


def check_choice(books: Books, core: Core, before: Turn) -> None:
    """Of a turn that placed one sequence, and of groups in which nothing else has changed."""
    placed = [
        sequence
        for number, sequence in core._live.items()
        if sequence.group is not None and before.places.get(number) is not sequence.group
    ]
    if len(placed) != 1 or before.places.get(placed[0].id) is not None:
        return
    (sequence,) = placed
    home, request = sequence.group, books.requests[sequence.id]
    assert home is not None
    charge = home.ledger.charge_of(account_of(sequence))
    if before.charged.get(home.up.group) != home.ledger.charged - charge:
        return
    taken = shareable(books, home, sequence, request), home.ledger.free + charge
    for book in books.serving(request.model):
        other = core._groups[book.name]
        same = before.charged.get(book.name) == other.ledger.charged
        if other is home or not same or not book.able(request) or other.running >= book.batch:
            continue
        books.seen["choice"] += 1
        better = shareable(books, other, sequence, request), other.ledger.free
        wrong = better > taken and has_room(books, book, other, request)
        ensure(not wrong, f"{request.id} was to go to {book.name}")


def shareable(books: Books, group: Group, sequence: Sequence, request: Request) -> int:
    """Tokens that a sequence could share in a group, as far as the books tell."""
    known = (*request.facts.prompt, *request.tokens)
    alike = [
        member
        for member in group.members()
        if member is not sequence and member.facts.adapter == request.facts.adapter
    ]
    most = max((common(known_of(group, member), known) for member in alike), default=0)
    share = group.ledger.whole_pages(min(most, len(known) - 1))
    shares = group.up.limits.shares_prefix and not request.scores_prompt
    return share if shares and share >= books.config.share_tokens_min else 0
