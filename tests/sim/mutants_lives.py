"""Mutants of the scheduler, the state, the waiting line and the prefix tree;
see ``mutants.py``."""

from tests.sim.mutation import Mutant

SCHEDULER = [
    Mutant(
        "scheduler.py",
        "if len(self._live) >= self.config.requests_max:",
        "if len(self._live) > self.config.requests_max:",
        "one request too many is taken",
    ),
    Mutant(
        "scheduler.py",
        "arrived_ms = now_ms + facts.priority * self.config.head_start_ms",
        "arrived_ms = now_ms",
        "priorities mean nothing",
    ),
    Mutant(
        "scheduler.py",
        "(arrived_ms, self._arrivals)",
        "(arrived_ms, -self._arrivals)",
        "of those that arrive together, the last goes first",
    ),
    Mutant(
        "scheduler.py",
        "        if refusal is not None:\n            return",
        "        if False:\n            return",
        "what can never run is refused only when its turn has come",
    ),
    Mutant(
        "refusing.py",
        "if not groups or any(able(group, sequence) for group in groups):",
        "if not groups or all(able(group, sequence) for group in groups):",
        "a request is refused that some group could run",
    ),
    Mutant(
        "refusing.py",
        "if not groups or any(able(group, sequence) for group in groups):",
        "if any(able(group, sequence) for group in groups):",
        "a request is refused for want of a group that may yet come up",
    ),
    Mutant(
        "scheduler.py",
        "return [self._close(self._live[event.request], event.reason)]",
        "return [self._close(self._live[event.request], Reason.CANCELLED)]",
        "every ending by the owner counts as a cancel",
    ),
    Mutant(
        "scheduler.py",
        "            if sequence.id in line:\n                line.remove(sequence.id)\n",
        "            pass\n",
        "a request that has ended stays in line",
    ),
    Mutant(
        "scheduler.py",
        "        elif useful:\n",
        "        elif False:\n",
        "nothing that is computed is kept for the next request",
    ),
    Mutant(
        "scheduler.py",
        "while self._deadlines and self._deadlines[0][0] <= now_ms:",
        "while self._deadlines and self._deadlines[0][0] < now_ms:",
        "a deadline is missed by a millisecond",
    ),
    Mutant(
        "scheduler.py",
        "group.answer_due_ms(self.config) <= now_ms:",
        "group.answer_due_ms(self.config) < now_ms:",
        "a stuck group is given up too late",
    ),
    Mutant(
        "scheduler.py",
        "if group.in_flight and group.answer_due_ms(self.config) <= now_ms:",
        "if False:",
        "a stuck group is never given up",
    ),
    Mutant(
        "scheduler.py",
        "due = [group.answer_due_ms(config) for group in groups if group.in_flight]",
        "due = list[int]()",
        "the timer forgets the step deadline",
    ),
    Mutant(
        "scheduler.py",
        "        if self._deadlines:\n            due.append",
        "        if self._deadlines and not due:\n            due.append",
        "the timer forgets the requests' deadlines while a plan is in flight",
    ),
    Mutant(
        "scheduler.py",
        "while self._deadlines and self._deadlines[0][1] not in self._live:",
        "while False:",
        "the timer is set for requests that have ended",
    ),
    Mutant(
        "scheduler.py",
        "return min(due, default=None)",
        "return max(due, default=None)",
        "the timer is set to the last thing due",
    ),
    Mutant(
        "state.py",
        "min(limits.kv_tokens, config.kv_tokens_max or limits.kv_tokens)",
        "limits.kv_tokens",
        "kv_tokens_max is ignored",
    ),
    Mutant(
        "state.py",
        "min(limits.step_tokens_max, config.step_tokens_max or limits.step_tokens_max)",
        "limits.step_tokens_max",
        "step_tokens_max is ignored",
    ),
    Mutant(
        "state.py",
        "batch = min(limits.sequences_max, step_tokens, config.sequences_max or step_tokens)",
        "batch = min(limits.sequences_max, config.sequences_max or limits.sequences_max)",
        "more sequences run than a step can decode",
    ),
    Mutant(
        "state.py",
        "batch = min(limits.sequences_max, step_tokens, config.sequences_max or step_tokens)",
        "batch = min(limits.sequences_max, step_tokens)",
        "sequences_max is ignored",
    ),
    Mutant(
        "scheduler.py",
        "if group is None or group.up.epoch != epoch:",
        "if group is None:",
        "old news ends a new life of a group",
    ),
    Mutant(
        "scheduler.py",
        "event.epoch:\n            return []\n        fault",
        "event.epoch and False:\n            return []\n        fault",
        "outcomes of a former epoch are believed",
    ),
    Mutant(
        "scheduler.py",
        "lost = self._lost(sequence) if was_resident else None",
        "lost = self._lost(sequence)",
        "the loss of a group counts for those who were not resident",
    ),
    Mutant(
        "scheduler.py",
        "                self._wait_again([sequence])\n",
        "                pass\n",
        "sequences are lost with their group, without a word",
    ),
    Mutant(
        "scheduler.py",
        "if sequence.produced and not self.config.resume_streams:",
        "if not self.config.resume_streams:",
        "a request that has produced nothing is not tried again",
    ),
    Mutant(
        "scheduler.py",
        "if sequence.produced and not self.config.resume_streams:",
        "if False:",
        "a broken stream goes on although that is not wanted",
    ),
    Mutant(
        "scheduler.py",
        "if sequence.losses >= self.config.attempts_max:",
        "if sequence.losses > self.config.attempts_max:",
        "a request is tried once too often",
    ),
    Mutant(
        "state.py",
        ">= progress_tokens_min:\n            self.losses = 0\n",
        ">= progress_tokens_min:\n            pass\n",
        "an answer that gets on ends after a few losses all the same",
    ),
    Mutant(
        "state.py",
        ">= progress_tokens_min:",
        "> progress_tokens_min:",
        "losses are counted anew a token too late",
    ),
    Mutant(
        "state.py",
        "if len(self.tokens) - self.lost_len >= progress_tokens_min:",
        "if len(self.tokens) > self.lost_len:",
        "a request that ends its worker with each token is tried for ever",
    ),
    Mutant(
        "state.py",
        "        self.lost_len = len(self.tokens)\n",
        "",
        "what an answer gained before its first loss counts at each",
    ),
    Mutant(
        "scheduler.py",
        "        group.in_flight.popleft()\n",
        "",
        "an answered plan stays in flight",
    ),
    Mutant(
        "scheduler.py",
        "        group.answered_ms = now_ms\n",
        "",
        "a plan's clock runs while the group is at work on the one before",
    ),
    Mutant(
        "scheduler.py",
        "if sequence is None or sequence.admitted_by > event.plan_id:",
        "if sequence is None:",
        "a token of a former residence is delivered",
    ),
    Mutant(
        "scheduler.py",
        "delivery.logprobs.append(event.logprobs[index])",
        "delivery.logprobs.append(event.logprobs[0])",
        "logprobs of another token are delivered",
    ),
    Mutant(
        "scheduler.py",
        "if token in sequence.facts.stop_tokens:",
        "if False:",
        "stop tokens do not stop",
    ),
    Mutant(
        "scheduler.py",
        "elif len(sequence.tokens) == sequence.end:",
        "elif len(sequence.tokens) == sequence.end - 1:",
        "the answer is a token short",
    ),
    Mutant(
        "scheduler.py",
        "if not event.plan_id < born <= later.plan_id:",
        "if False:",
        "a plan that was sent before a failure was known is not believed",
    ),
    Mutant(
        "scheduler.py",
        "if sequence is not None and 0 < born <= event.plan_id:",
        "if False:",
        "a sequence that the engine gave up is never ended",
    ),
    Mutant(
        "scheduler.py",
        "Reason.ENGINE_FAILED, message, False)",
        "Reason.ENGINE_FAILED, message)",
        "a sequence that failed becomes a donor",
    ),
    Mutant(
        "scheduler.py",
        "            self._wait_again(preempted)\n",
        "",
        "preempted sequences are forgotten",
    ),
    Mutant(
        "scheduler.py",
        "                    effects.append(self._close(head, refusal.reason, refusal.detail))",
        "                    break",
        "what no group can run any more blocks the line",
    ),
    Mutant(
        "scheduler.py",
        "self._serving(sequence.facts.model) if able(group, sequence)]",
        "self._serving(sequence.facts.model)]",
        "a request is placed where it cannot run",
    ),
    Mutant(
        "scheduler.py",
        "if one.up.model == model and not one.leaving]",
        "if not one.leaving]",
        "a request is placed with another model",
    ),
    Mutant(
        "outcomes.py",
        "or group.in_flight[0].plan_id != event.plan_id:",
        "or group.in_flight[0].plan_id > event.plan_id:",
        "outcomes may come in any order",
    ),
    Mutant(
        "outcomes.py",
        "if len(event.sequences) != len(event.tokens):",
        "if False:",
        "tokens for nobody are believed",
    ),
    Mutant(
        "outcomes.py",
        "len(event.sequences) != len(due) or due.keys() != set(event.sequences):",
        "len(event.sequences) != len(due):",
        "tokens for the wrong sequences are believed",
    ),
    Mutant(
        "outcomes.py",
        "len(event.sequences) != len(due) or due.keys() != set(event.sequences):",
        "due.keys() != set(event.sequences):",
        "two tokens for one sequence are believed",
    ),
]

ROUNDS = [
    Mutant(
        "scheduler.py",
        "            for line in self._lines.values():\n",
        "            for line in list(self._lines.values())[:1]:\n",
        "only the first model is served",
    ),
    Mutant(
        "scheduler.py",
        "        while before < len(effects):\n",
        "        while before < 0:\n",
        "what one round of plans makes possible is left for later",
    ),
]

STATE = [
    Mutant(
        "state.py",
        "max(self.in_flight[0].sent_ms, self.answered_ms)",
        "self.in_flight[-1].sent_ms",
        "each new plan puts off the deadline of the oldest",
    ),
    Mutant(
        "state.py",
        "return self.running + len(self.donors)",
        "return self.running",
        "donors do not count as resident",
    ),
]

WAITING = [
    Mutant(
        "waiting.py",
        "heapq.heappush(self._heap, (sequence.key, sequence.id))",
        "self._heap.append((sequence.key, sequence.id))",
        "who comes back stands at the end of the line",
    ),
    Mutant(
        "waiting.py",
        "(sequence.key, sequence.id))",
        "((0, 0), sequence.id))",
        "the line is in order of number",
    ),
    Mutant(
        "waiting.py",
        "if entry[1] in self.members]",
        "if entry[1] not in self.members]",
        "tidying the line throws away those who wait",
    ),
]

PREFIX = [
    Mutant(
        "prefix.py",
        "        if ours != theirs:\n            return index\n",
        "        if ours != theirs:\n            return index + 1\n",
        "one token too many counts as common",
    ),
    Mutant(
        "prefix.py",
        "depth += common",
        "depth += len(child.edge)",
        "a run counts as common that is so only in part",
    ),
    Mutant(
        "prefix.py",
        "holders=dict(lower.holders))",
        "holders={})",
        "the holders of a run are forgotten when it is cut",
    ),
    Mutant(
        "prefix.py",
        "parent.depth + at, parent",
        "at, parent",
        "the depth of a cut is counted from its parent",
    ),
    Mutant(
        "prefix.py",
        "parent.children[upper.edge[0]] = upper",
        "pass",
        "the upper part of a cut is not found",
    ),
    Mutant(
        "prefix.py",
        "            child.holders[holder] = None\n",
        "            child.holders.setdefault(next(iter(child.holders), holder), None)\n",
        "only the first holder of a run is listed",
    ),
    Mutant(
        "prefix.py",
        "            node.holders.pop(holder)\n",
        "",
        "those who are gone still count as holders",
    ),
    Mutant(
        "prefix.py",
        "                break\n            node = child\n",
        "                break\n            break\n",
        "only the first run of the tree is shared",
    ),
]

LIVES = [*SCHEDULER, *ROUNDS, *STATE, *WAITING, *PREFIX]
