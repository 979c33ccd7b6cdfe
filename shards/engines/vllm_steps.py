"""Steps of ours as vLLM's executor takes them: what its scheduler would have said.

vLLM's worker keeps for each request its tokens and its blocks, and is told the changes. Here are
the changes: which sequences are new, which blocks have come, which sequences are gone.
"""

from collections.abc import Mapping
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from shards.engines.caller import Work
from shards.engines.vllm_params import native_params
from shards.kv import PageTables
from shards.residents import Resident


class Steps:
    """What vLLM's worker has been told of each sequence, and what it is to be told next.

    ``adapters`` are the LoRA adapters by name; ``own`` and ``vocab_size`` are as for
    ``native_params``. Pages are vLLM's blocks, with the same numbers: both count from 1, and leave
    0 to nobody.
    """

    def __init__(
        self,
        tables: PageTables,
        adapters: Mapping[str, LoRARequest],
        own: bool,
        vocab_size: int,
    ) -> None:
        self._tables = tables
        self._adapters = adapters
        self._own, self._vocab = own, vocab_size
        self._known: dict[int, _Known] = {}
        self._gone: set[str] = set()

    def let_go(self, sequence: int) -> None:
        """Tells with the next step that a sequence is gone."""
        if self._known.pop(sequence, None):
            self._gone.add(name(sequence))

    def clear(self) -> None:
        """Tells with the next step that all are gone."""
        self._gone.update(map(name, self._known))
        self._known.clear()

    def output(self, work: Work) -> SchedulerOutput:
        """The next step; the pages that it needs have been given to its sequences."""
        output = SchedulerOutput.make_empty()
        output.finished_req_ids, self._gone = self._gone, set()
        for resident, count in work:
            output.num_scheduled_tokens[name(resident.sequence)] = count
            known = self._known.get(resident.sequence)
            if known is None:
                output.scheduled_new_reqs.append(self._new(resident))
            else:
                self._more(known, resident, output.scheduled_cached_reqs)
        output.total_num_scheduled_tokens = sum(count for _, count in work)
        return output

    def _new(self, resident: Resident) -> NewRequestData:
        pages = list(self._tables.table(resident.sequence))
        self._known[resident.sequence] = _Known(len(pages), len(resident.tokens))
        return NewRequestData(
            req_id=name(resident.sequence),
            prompt_token_ids=list(resident.tokens),
            mm_features=[],
            sampling_params=native_params(resident, self._own, self._vocab),
            pooling_params=None,
            block_ids=(pages,),
            num_computed_tokens=resident.computed,
            lora_request=self._adapters[resident.adapter] if resident.adapter else None,
        )

    def _more(self, known: "_Known", resident: Resident, cached: CachedRequestData) -> None:
        pages = self._tables.table(resident.sequence)
        fresh: Any = (list(pages[known.pages :]),) if len(pages) > known.pages else None
        known.pages = len(pages)
        cached.req_ids.append(name(resident.sequence))
        cached.new_block_ids.append(fresh)
        cached.num_computed_tokens.append(resident.computed)
        cached.num_output_tokens.append(len(resident.tokens) - known.given)


class _Known:
    """Of a sequence: how many pages vLLM's worker knows, and with how many tokens it came."""

    __slots__ = ("given", "pages")

    def __init__(self, pages: int, given: int) -> None:
        self.pages = pages
        self.given = given


def name(sequence: int) -> str:
    """A sequence's name as a request of vLLM's."""
    return str(sequence)
