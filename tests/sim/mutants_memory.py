"""Mutants of the ledger, placement and planning; see ``mutants.py``."""

from tests.sim.mutation import Mutant

LEDGER = [
    Mutant(
        "ledger.py",
        "return self.pages(account.reserved) - account.share_len",
        "return self.pages(account.reserved)",
        "shared tokens are counted twice",
    ),
    Mutant(
        "ledger.py",
        "self._add(heir.share_len - former.share_len)",
        "self._add(0)",
        "the heir is not charged for what it takes over",
    ),
    Mutant(
        "ledger.py",
        "self._inherit(account, max(",
        "self._inherit(account, min(",
        "the heir is a child that shares less than its siblings",
    ),
    Mutant(
        "ledger.py",
        "return -(-tokens // self.page) * self.page",
        "return tokens // self.page * self.page",
        "reservations are rounded down to whole pages",
    ),
    Mutant(
        "ledger.py",
        "return tokens - tokens % self.page",
        "return tokens",
        "parts of pages are shared",
    ),
    Mutant(
        "ledger.py",
        "while parent is not None and share_len <= parent.share_len:",
        "while False:",
        "a child shares less than its parent does",
    ),
    Mutant(
        "ledger.py",
        "account.parent.children.remove(account)",
        "pass",
        "a closed account stays a child",
    ),
    Mutant(
        "ledger.py",
        "parent.children.append(account)",
        "pass",
        "an account does not know who shares it",
    ),
    Mutant(
        "ledger.py",
        "                sibling.parent = heir\n",
        "",
        "the siblings of an heir keep a parent that is gone",
    ),
    Mutant(
        "ledger.py",
        "            heir.parent.children.append(heir)",
        "            pass",
        "an heir is unknown to its new parent",
    ),
    Mutant(
        "ledger.py",
        "heir.parent, heir.share_len = former.parent, former.share_len",
        "heir.parent, heir.share_len = None, 0",
        "an heir forgets what the former owner shared",
    ),
    Mutant(
        "ledger.py",
        "held[parent.holder] = max(held[parent.holder], child.share_len)",
        "pass",
        "donors are evicted in vain, for memory that others inherit",
    ),
    Mutant(
        "ledger.py",
        "                child = parent\n",
        "                break\n",
        "memory that is inherited over two steps counts as freed",
    ),
    Mutant(
        "ledger.py",
        "reached = held[parent.holder] > parent.share_len",
        "reached = held[parent.holder] >= parent.share_len",
        "what the ancestors of an heir keep counts as freed",
    ),
]

PLACING = [
    Mutant(
        "placing.py",
        "sequence.end <= group.up.limits.length_max",
        "len(sequence.facts.prompt) <= group.up.limits.length_max",
        "a sequence grows longer than the engine allows",
    ),
    Mutant(
        "placing.py",
        "and group.ledger.pages(sequence.end) <= group.ledger.capacity",
        "",
        "a sequence is accepted that memory can never hold",
    ),
    Mutant(
        "placing.py",
        "and group.ledger.pages(sequence.end) <= group.ledger.capacity",
        "and group.ledger.pages(sequence.end) < group.ledger.capacity",
        "a sequence that just fits is refused",
    ),
    Mutant(
        "placing.py",
        "if need not in group.up.features:",
        "if need in ():",
        "a sequence is placed where its needs are not met",
    ),
    Mutant(
        "placing.py",
        "if group.running < group.batch_max]",
        "if group.running <= group.batch_max]",
        "the batch is larger than it may be",
    ),
    Mutant(
        "placing.py",
        "if not group.up.limits.shares_prefix or sequence.scores_prompt:",
        "if sequence.scores_prompt:",
        "an engine is told to share that cannot",
    ),
    Mutant(
        "placing.py",
        "min(length, len(sequence.tokens) - 1)",
        "min(length, len(sequence.tokens))",
        "nothing is left to compute, so nothing is drawn",
    ),
    Mutant(
        "placing.py",
        "return (0, None) if length < config.share_tokens_min else (length, holder)",
        "return 0, None",
        "nothing is ever shared",
    ),
    Mutant(
        "placing.py",
        "return min(sequence.end, len(sequence.tokens) + config.reserve_tokens)",
        "reserve = min(sequence.end, sequence.prompt_len + config.reserve_tokens)",
        "what was generated before a loss has no memory",
    ),
    Mutant(
        "placing.py",
        "if not _make_room(group, pages - share_len, keep=donor)",
        "if not _make_room(group, pages - share_len, keep=None)",
        "the donor that is to be shared is evicted for it",
    ),
    Mutant(
        "placing.py",
        "if not _make_room(group, pages - share_len, keep=donor)",
        "if not _make_room(group, pages, keep=donor)",
        "room is made for what is shared",
    ),
    Mutant(
        "placing.py",
        "        if group.running:\n            return False\n",
        "        return False\n",
        "an idle group waits for memory that only its donors hold",
    ),
    Mutant(
        "placing.py",
        "group.donors[donor] = group.donors.pop(donor)",
        "pass",
        "a donor in use is evicted as if it were not",
    ),
    Mutant(
        "placing.py",
        "group.tree.insert(sequence.id, sequence.tokens, sequence.facts.adapter)",
        "group.tree.insert(sequence.id, ())",
        "requests that run together do not share",
    ),
    Mutant(
        "placing.py",
        "or group.resident >= group.up.limits.sequences_max:",
        "or group.resident > group.up.limits.sequences_max:",
        "more sequences are resident than there are places",
    ),
    Mutant(
        "placing.py",
        "next(donor for donor in _evictable(group) if donor.id != keep)",
        "next(donor for donor in [*_evictable(group)][::-1] if donor.id != keep)",
        "the donor used last is evicted first",
    ),
    Mutant(
        "placing.py",
        "sure += 0 if account.children else group.ledger.charge_of(account)",
        "sure += group.ledger.charge_of(account)",
        "donors go for a request that all of them together do not make room for",
    ),
    Mutant(
        "placing.py",
        "        if sure >= tokens:\n            return True\n",
        "        return True\n",
        "donors go though there will not be room",
    ),
    Mutant(
        "placing.py",
        "group.donors.values() if donor.id not in pinned)",
        "group.donors.values())",
        "a donor is evicted while a placed sequence counts on it",
    ),
    Mutant(
        "placing.py",
        "if parent is not None and not waiting.admitted:",
        "if parent is not None:",
        "donors stay pinned after they have been shared",
    ),
    Mutant(
        "placing.py",
        "reserve = min(sequence.end, sequence.scheduled + 1 + config.reserve_tokens)",
        "reserve = min(sequence.end, sequence.scheduled + config.reserve_tokens)",
        "the token of this step has no memory",
    ),
    Mutant(
        "placing.py",
        "victim = max(running, key",
        "victim = min(running, key",
        "the first in line is preempted",
    ),
    Mutant(
        "placing.py",
        "    group.ledger.resize(account, sequence.scheduled)\n",
        "",
        "a donor keeps memory that it will never use",
    ),
    Mutant(
        "placing.py",
        "group.tree.insert(sequence.id, known, sequence.facts.adapter)",
        "group.tree.insert(sequence.id, sequence.tokens, sequence.facts.adapter)",
        "a donor offers what it has not computed",
    ),
    Mutant(
        "placing.py",
        "known = sequence.tokens[: sequence.scheduled]",
        "known = sequence.tokens[: min(sequence.scheduled, sequence.prompt_len)]",
        "answers cannot be shared by the next turn",
    ),
    Mutant(
        "placing.py",
        "all(child.share_len <= sequence.scheduled for child in account.children)",
        "True",
        "a placed sequence waits for what will never be computed",
    ),
    Mutant(
        "placing.py",
        "all(child.share_len <= sequence.scheduled for child in account.children)",
        "not account.children",
        "a finished sequence is dropped because others share it",
    ),
    Mutant(
        "placing.py",
        "    group.ledger.close(account_of(sequence))\n",
        "",
        "memory is never given back",
    ),
    Mutant(
        "placing.py",
        "    if sequence.admitted:\n        group.drops",
        "    if not sequence.admitted:\n        group.drops",
        "workers are not told to drop what they hold",
    ),
    Mutant(
        "placing.py",
        "    sequence.leave()\n",
        "",
        "a preempted sequence is not computed anew",
    ),
]

EXTENDING = [
    Mutant(
        "placing.py",
        "return min(sequence.end, len(sequence.tokens) + config.reserve_tokens)",
        "reserve = len(sequence.tokens) + config.reserve_tokens",
        "memory is reserved that the answer can never need",
    ),
    Mutant(
        "placing.py",
        "reserve = min(sequence.end, sequence.scheduled + 1 + config.reserve_tokens)",
        "reserve = sequence.scheduled + 1 + config.reserve_tokens",
        "an answer that grows reserves more than it can ever need",
    ),
    Mutant(
        "placing.py",
        "        if donor is not None:\n            remove(group, donor)",
        "        if False:\n            remove(group, donor)",
        "sequences are preempted for the sake of donors",
    ),
]

PLANNING = [
    Mutant(
        "scheduler.py",
        "len(group.in_flight) < self.config.plans_in_flight_max",
        "len(group.in_flight) <= self.config.plans_in_flight_max",
        "too many plans are in flight",
    ),
    Mutant(
        "planning.py",
        "if not step.work and not group.drops:",
        "if not step.work:",
        "drops wait until there is work",
    ),
    Mutant(
        "planning.py",
        "account.reserved <= sequence.scheduled < sequence.end - 1",
        "account.reserved < sequence.scheduled < sequence.end - 1",
        "memory is reserved one token too late",
    ),
    Mutant(
        "planning.py",
        "            if sequence.scheduled < sequence.end - 1:\n",
        "            if sequence.scheduled < sequence.end:\n",
        "a token is drawn beyond the last",
    ),
    Mutant(
        "planning.py",
        "        self.budget -= len(work)\n",
        "",
        "decodes do not count in the step budget",
    ),
    Mutant(
        "planning.py",
        "            self.budget -= chunk\n",
        "            self.budget = 0\n",
        "one prompt is filled in each step, even if there is room for more",
    ),
    Mutant(
        "planning.py",
        "chunk = min(self.budget, len(sequence.tokens) - sequence.scheduled)",
        "chunk = len(sequence.tokens) - sequence.scheduled",
        "prompts are not cut to the step budget",
    ),
    Mutant(
        "planning.py",
        "self._admit(sequence):\n                continue",
        "self._admit(sequence):\n                return",
        "one who waits for a parent holds up everybody behind it",
    ),
    Mutant(
        "planning.py",
        "computed = parent.scheduled - self.work.get(parent.id, 0)",
        "computed = parent.scheduled",
        "what this step computes is shared before it runs",
    ),
    Mutant(
        "planning.py",
        "if not parent.admitted or computed < account.share_len:",
        "if not parent.admitted:",
        "more is shared than is computed",
    ),
    Mutant(
        "planning.py",
        "if not parent.admitted or computed < account.share_len:",
        "if not parent.admitted or computed <= account.share_len:",
        "one who could share at once waits, perhaps for ever",
    ),
    Mutant(
        "planning.py",
        "sequence.scheduled = account.share_len",
        "sequence.scheduled = 0",
        "shared tokens are computed again",
    ),
    Mutant(
        "planning.py",
        "        self.samples[sequence.id] = None\n",
        "",
        "the first token of a sequence is unexpected",
    ),
    Mutant(
        "planning.py",
        "drops, group.drops = tuple(group.drops), []",
        "drops = tuple(group.drops)",
        "drops are sent twice",
    ),
    Mutant(
        "planning.py",
        "group.plans = self.plan_id",
        "pass",
        "plan ids do not count up",
    ),
]

MEMORY = [*LEDGER, *PLACING, *EXTENDING, *PLANNING]
