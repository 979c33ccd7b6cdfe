"""What must hold of every plan that is sent, and of the core after every turn.

Most of it is computed anew from the books and the simulated workers. Where it looks inside the
core, it is to compare the core's account with theirs.
"""

from router.core.effects import Close, RunPlan
from router.core.events import Reason
from router.core.scheduler import Core
from router.core.state import Group, Sequence
from tests.sim.books import Books, GroupBook, Request
from tests.sim.sharing import check_sharing, common, known_of, scores, shared_now
from tests.sim.turn import Places, Turn, account_of, pinned
from tests.sim.worker import ensure


def check_plan(books: Books, group: GroupBook, plan: RunPlan) -> None:
    """A plan, before the worker applies it: nobody was left out or preempted unduly."""
    work = dict(zip(plan.work_sequences, plan.work_tokens, strict=True))
    group.plan, group.budget_left = plan, group.step_tokens - sum(plan.work_tokens)
    ensure(group.budget_left >= 0, "more work than the step budget")
    fillers = {admit.sequence: len(admit.tokens) - admit.share_len for admit in plan.admits}
    running, failed = list(fillers), set[int]()
    for number, resident in group.worker.residents.items():
        request = books.requests[number]
        if number in plan.drops or not request.open:
            continue
        running.append(number)
        if resident.failed:
            failed.add(number)  # the core has not heard of it, and goes on with it
            continue
        if resident.drawn == 0:
            fillers[number] = len(resident.tokens) - resident.computed
        elif len(resident.tokens) < request.end:
            ensure(work.get(number) == 1, f"{number} is not decoded in this step")
    ensure(len(running) <= group.batch, "more sequences run than the batch may have")
    ensure(not fillers or (fillers.keys() | failed) & work.keys(), "nobody's prompt makes progress")
    for number, pending in fillers.items():
        full = work.get(number) == pending or group.budget_left == 0
        ensure(full, f"{number} is not filled although the step has room")
    _check_victims(books, plan, running)


def _check_victims(books: Books, plan: RunPlan, running: list[int]) -> None:
    """Whoever is preempted is last in line of those that run."""
    home = books.groups[plan.group]
    gone = (books.requests[number] for number in plan.drops)
    victims = [request for request in gone if request.open and request.home is home]
    keys = [books.requests[number].key for number in running]
    for victim in victims:
        books.seen["preemption"] += 1
        home.robbed = True
        ensure(not keys or max(keys) < victim.key, f"{victim.id} is preempted out of turn")


def check_kept(books: Books, core: Core, close: Close) -> None:
    """What a request had computed stays for others to share, unless one of them needs more of it.

    Called before the books are changed.
    """
    request = books.requests[close.request]
    group = None if request.home is None else core._groups.get(request.home.name)
    if group is None or request.home is None or close.reason is Reason.ENGINE_FAILED:
        return
    resident = request.home.worker.residents.get(request.id)
    if resident is None or not resident.computed or not group.up.limits.shares_prefix:
        return
    wanted = any(
        not member.admitted and common(resident.tokens, member.tokens) > resident.computed
        for member in group.filling.values()
        if member.facts.adapter == resident.adapter and not scores(member)
    )
    scarce = group.up.limits.donor_tokens_max is not None
    ensure(
        request.id in group.donors or wanted or scarce, f"what {request.id} computed is thrown away"
    )


def check_turn(books: Books, core: Core, before: Turn) -> None:
    """The core after a turn."""
    ensure(core._live.keys() == books.open.keys(), "the core and the clients differ on who lives")
    ensure(len(books.open) <= books.config.requests_max, "more requests than requests_max")
    ensure(core._groups.keys() == books.groups.keys(), "the core knows other groups")
    waiting = _check_places(books, core)
    preempted = core.counters.preempted > before.preempted
    for name, group in core._groups.items():
        _check_memory(books.groups[name], group)
        _check_progress(books, books.groups[name], group, {} if preempted else before.places)
        if before.lives.get(name) is group and not preempted:
            _check_evictions(books, group, before)
            check_sharing(books, group, before)
    if not preempted:
        _check_line(books, core, before, waiting)
    _check_heads(books, core, waiting)
    _check_wake(books, core)


def _check_places(books: Books, core: Core) -> list[Request]:
    """Each request is in exactly one place; returns those that wait."""
    waiting = []
    for number, sequence in core._live.items():
        line = core._lines[sequence.facts.model]
        places = [g for g in core._groups.values() if g.placed(number) is sequence]
        ensure(len(places) + (number in line) == 1, f"{number} is in no place, or in several")
        ensure(sequence.group is (places[0] if places else None), f"{number} is elsewhere")
        if not places:
            waiting.append(books.requests[number])
    ensure(sum(len(line) for line in core._lines.values()) == len(waiting), "ghosts are waiting")
    placed = sum(group.running for group in core._groups.values())
    ensure(placed == len(core._live) - len(waiting), "ghosts are running")
    return waiting


def _check_memory(book: GroupBook, group: Group) -> None:
    """The ledger is the sum of its accounts, and exactly what the worker holds and will hold."""
    members = [*group.decoding.values(), *group.filling.values(), *group.donors.values()]
    ledger, worker, page = group.ledger, book.worker, book.limits.page_tokens
    ensure(len(members) <= book.limits.sequences_max, "more residents than sequences_max")
    ensure(all(member.id in group.tree for member in members), "a holder is not in the tree")
    ensure(len(members) == len(group.tree._ends), "the tree holds what is gone")
    charged = used = 0
    for member in members:
        account = account_of(member)
        charged += ledger.charge_of(account)
        ensure(account.reserved <= member.end, f"{member.id} reserves more than it can use")
        resident = worker.residents.get(member.id)
        if member.admitted and resident is not None:
            ahead = ledger.pages(account.reserved) - len(resident.pages) * page
            ensure(ahead >= 0, f"{member.id} has computed more than it has reserved")
            idle = member.id in group.donors and not resident.failed
            ensure(ahead == 0 or not idle, f"donor {member.id} holds more than it has computed")
            used += ahead
        else:
            used += ledger.charge_of(account)
    ensure(charged == ledger.charged <= book.kv_capacity, "the ledger is not its accounts' sum")
    if group.drops or any(resident.failed for resident in worker.residents.values()):
        return
    admitted = {member.id for member in members if member.admitted}
    ensure(admitted == worker.residents.keys(), "the worker holds other sequences")
    ensure(worker.kv_used + used == charged, "the ledger is not what the worker holds")


def _check_progress(books: Books, book: GroupBook, group: Group, stood: Places) -> None:
    """Nothing that could be computed is left, unless all slots for plans are in use."""
    ensure(len(book.in_flight) <= books.config.plans_in_flight_max, "too many plans in flight")
    ensure(len(book.in_flight) == len(group.in_flight), "the core miscounts its plans")
    if len(book.in_flight) < books.config.plans_in_flight_max:
        ensure(not group.filling and not group.drops, "work is left, and a slot for a plan")
    idle = {}
    for number, sequence in group.filling.items():
        if not sequence.admitted:
            ready = _check_waits(books, book, group, sequence) and stood.get(number) is group
            ensure(not ready or not book.plan, f"{number} waits for nothing")
        idle[number] = book.idle_plans.get(number, 0)
        ensure(idle[number] <= book.kv_capacity + 2, f"{number} makes no progress")
    book.idle_plans = idle


def _check_waits(books: Books, book: GroupBook, group: Group, sequence: Sequence) -> bool:
    """Whether a placed sequence could have been admitted with the latest plan."""
    account = account_of(sequence)
    if account.parent is None:
        books.seen["heir not admitted yet"] += sequence.id in books.waits
        return book.budget_left > 0
    books.seen["wait for a parent"] += 1
    first = books.waits.setdefault(sequence.id, account.parent.holder)
    books.seen["heir not admitted yet"] += first != account.parent.holder
    source = group.holder(account.parent.holder)
    work = 0 if book.plan is None else _work_on(book.plan, account.parent.holder)
    computed = source.scheduled - work
    return book.budget_left > 0 and source.admitted and computed >= account.share_len


def _work_on(plan: RunPlan, sequence: int) -> int:
    if sequence not in plan.work_sequences:
        return 0
    return plan.work_tokens[plan.work_sequences.index(sequence)]


def _check_evictions(books: Books, group: Group, before: Turn) -> None:
    """The donor used least recently goes first, unless somebody shares it or is about to."""
    former = before.donors[group.up.group]
    gone = [index for index, donor in enumerate(former) if donor not in group.donors]
    books.seen["eviction"] += len(gone)
    scarce = group.up.limits.donor_tokens_max is not None
    ensure(not gone or scarce or _grown(group, before), "donors were evicted in vain")
    for donor in former[: max(gone, default=0)]:
        if donor in group.donors and donor not in before.pinned[group.up.group]:
            ensure(
                shared_now(books, group, donor, before),
                f"{donor} was to go before {former[gone[-1]]}",
            )


def _grown(group: Group, before: Turn) -> bool:
    """Whether somebody was placed, or has reserved more than before."""
    members = (*group.filling.values(), *group.decoding.values())
    return any(
        before.places.get(member.id) is not group
        or account_of(member).reserved > before.reserved[member.id]
        for member in members
    )


def _check_line(books: Books, core: Core, before: Turn, waiting: list[Request]) -> None:
    """Nobody was placed ahead of one who stood before it in the same line.

    Those who move stand in no line.
    """
    placed = [
        books.requests[number]
        for number, sequence in core._live.items()
        if sequence.group is not None
        and (former := before.places.get(number)) is not sequence.group
        and not (former is not None and former.leaving)
    ]
    waiting = [request for request in waiting if request.id not in books.aside]
    for model in range(2):
        left = [r.key for r in waiting if r.model == model and before.places[r.id] is None]
        taken = [r.key for r in placed if r.model == model]
        if left and taken:
            ensure(max(taken) < min(left), "somebody was overtaken in the line")


def _check_heads(books: Books, core: Core, waiting: list[Request]) -> None:
    """The head of a line waits only if there is no room for it."""
    for model in range(2):
        line = [one for one in waiting if one.model == model and one.id not in books.aside]
        if not line:
            continue
        head = min(line, key=lambda request: request.key)
        books.seen["wait for room"] += 1
        able = [book for book in books.serving(model) if book.able(head)]
        ensure(able or not books.serving(model), f"{head.id} waits for what cannot be")
        for book in able:
            ensure(not has_room(books, book, core._groups[book.name], head), f"{head.id} had room")


def has_room(books: Books, book: GroupBook, group: Group, head: Request) -> bool:
    """Whether the request fits beside what runs, even if the largest donor has to be kept."""
    if not group.running:
        return True
    if group.running >= book.batch:
        return False
    page = book.limits.page_tokens
    tokens = len(head.facts.prompt) + len(head.tokens) + books.config.reserve_tokens
    known = (*head.facts.prompt, *head.tokens)
    adapter = head.facts.adapter
    alike = [member for member in group.members() if member.facts.adapter == adapter]
    most = max((common(known_of(group, member), known) for member in alike), default=0)
    share = group.ledger.whole_pages(min(most, len(known) - 1))
    shares = group.up.limits.shares_prefix and share >= books.config.share_tokens_min
    shares = shares and not head.scores_prompt
    need = -(-min(head.end, tokens) // page) * page - shares * share
    held = pinned(group)
    charges = [
        group.ledger.charge_of(account_of(donor))
        for donor in group.donors.values()
        if donor.id not in held and not account_of(donor).children
    ]
    free = group.ledger.free + sum(charges) - max(charges, default=0)
    return need <= free and (
        len(charges) > 1 or group.running + len(group.donors) < book.limits.sequences_max
    )


def _check_wake(books: Books, core: Core) -> None:
    """The timer is set to the first thing that is due, which is not yet past."""
    due = [r.facts.deadline_ms for r in books.open.values() if r.facts.deadline_ms is not None]
    due += [at for group in books.groups.values() if (at := group.due_ms(books.config)) is not None]
    due += [since + books.config.resume_timeout_ms for since in books.stranded.values()]
    if any(not books.requests[number].tokens for number in books.aside):
        due += [until for until, _ in books.away.values()]
    wake = core.wake_at()
    ensure(
        wake == min(due, default=None), f"wake_at is {wake}, but {min(due, default=None)} is due"
    )
    ensure(wake is None or wake > books.now, "wake_at is past")


def check_end(books: Books, core: Core) -> None:
    """Everything has ended, and nothing is held but what donors keep for the next request."""
    ensure(not books.open, f"these wait for ever: {list(books.open)}")
    shot = core.snapshot()
    ensure(shot.waiting == shot.running == 0, "something is left after the end")
    ensure(shot.admitted_tokens == books.admitted_tokens, "admitted tokens are miscounted")
    ensure(shot.prefix_hit_tokens == books.shared_tokens, "shared tokens are miscounted")
    again = books.seen["resume"] + books.seen["retry"]
    ensure(shot.resumed == again, "those who are started again are miscounted")
    for group in shot.groups:
        ensure(group.kv_used == 0, f"{group.name} holds memory for nobody")
        ensure(group.plans_in_flight == 0, f"{group.name} has a plan in flight at the end")
        donors = books.groups[group.name].worker.residents
        ensure(len(donors) == group.donors, f"{group.name} forgot a resident sequence")
