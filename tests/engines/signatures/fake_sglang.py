"""``sglang`` with the recorded signature, around the toy engine."""

from collections.abc import AsyncIterator
from types import ModuleType
from typing import Any

import numpy as np

from shards.engines.base import SamplingParams
from tests.engines.signatures.strict import bind, fields, recorded
from tests.engines.signatures.toy import VOCAB, Running, ToyEngine

ARGUMENTS = fields(
    "sglang",
    *("Model", "Schedule", "Serving", "Lora", "Device", "Memory", "Parallel", "ExecDeterministic"),
)
PAGE = 8


class TokenizerManager:
    """Streams of requests; one that is closed before its end aborts its request."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    async def generate_request(self, given: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        toy = self._engine.toy
        request = self._engine.request_of(given)
        toy.submit(request)
        try:
            while (piece := await request.hear()) is not None:
                yield self._engine.output_of(request, piece, given)
            last = self._engine.output_of(request, len(request.made), given)
            last["meta_info"]["finish_reason"] = {"type": request.reason, "message": "Aborted"}
            yield last
        except BaseException:
            toy.abort(request.key)
            raise


class Engine:
    """``sglang.Engine``; what tests turn is in ``toy`` and the class's own fields."""

    pool_tokens = 1 << 12
    broken = ""
    made: "list[Engine]" = []  # noqa: RUF012 - emptied by whoever makes one

    def __init__(self, **kwargs: Any) -> None:
        bind("sglang", "Engine.__init__", (), kwargs)
        unknown = kwargs.keys() - set(ARGUMENTS)
        if unknown:
            raise TypeError(f"ServerArgs got unexpected keyword arguments {sorted(unknown)}")
        if self.broken:
            raise RuntimeError(self.broken)
        self.arguments = kwargs
        self.toy = ToyEngine(
            kwargs.get("max_total_tokens") or self.pool_tokens, kwargs["max_running_requests"]
        )
        self.tokenizer_manager = TokenizerManager(self)
        self.shut_down = 0
        Engine.made.append(self)

    def get_server_info(self) -> dict[str, Any]:
        pool = self.toy.pool_tokens
        facts = {
            "max_total_num_tokens": pool,
            "max_req_input_len": min(1024, pool) - 6,
            "page_size": PAGE,
            "device": "fake",
            "dtype": "float32",
            "internal_states": [{"effective_max_running_requests_per_dp": self.toy.running_max}],
        }
        known = {
            *ARGUMENTS,
            *recorded("sglang", "keys", "Engine.get_server_info"),
            *recorded("sglang", "keys", "Scheduler.get_init_info"),
        }
        assert facts.keys() <= known
        name = "SchedulerInternalStateController._add_topology"
        assert facts["internal_states"][0].keys() <= set(recorded("sglang", "keys", name))
        return facts

    async def async_generate(self, *args: Any, **kwargs: Any) -> Any:
        given = bind("sglang", "Engine.async_generate", args, kwargs)
        assert given["stream"] is True
        return self.tokenizer_manager.generate_request(given)

    def shutdown(self) -> None:
        self.shut_down += 1

    def request_of(self, given: dict[str, Any]) -> Running:
        """The request in the toy's words; raises what the real one raises for bad parameters."""
        sampling = given["sampling_params"]
        unknown = sampling.keys() - set(fields("sglang", "SamplingParams"))
        if unknown:
            raise TypeError(f"Unexpected keyword argument {sorted(unknown)}")
        top_k = sampling.get("top_k", -1)
        if top_k < 1 and top_k != -1:
            raise ValueError(f"top_k must be -1 (disable) or at least 1, got {top_k}.")
        if sampling.get("min_new_tokens", 0) > 0:
            raise ValueError("min_new_tokens is unavailable when skip_tokenizer_init=True")
        seed = sampling.get("sampling_seed")
        assert seed is None or -(2**63) <= seed < 2**63
        bias = np.zeros(VOCAB, np.float32)
        for token, value in (sampling.get("logit_bias") or {}).items():
            assert isinstance(token, str)
            bias[int(token)] += value
        exact = self.arguments.get("enable_deterministic_inference")
        ends = () if sampling.get("ignore_eos") else sampling.get("stop_token_ids", ())
        return Running(
            key=given["rid"],
            tokens=list(given["input_ids"]),
            count=sampling["max_new_tokens"],
            sampling=SamplingParams(
                temperature=sampling["temperature"],
                top_k=max(0, top_k),
                top_p=sampling["top_p"],
                min_p=sampling["min_p"],
                seed=(seed or 0) if exact else len(self.toy.asked),
                logprobs=bool(given.get("return_logprob")),
                top_logprobs=given.get("top_logprobs_num") or 0,
            ),
            bias=bias,
            stops=frozenset(ends),
        )

    def output_of(self, request: Running, count: int, given: dict[str, Any]) -> dict[str, Any]:
        """One piece of a stream: everything so far."""
        meta: dict[str, Any] = {"id": request.key, "finish_reason": None}
        if given.get("return_logprob"):
            drawn = list(zip(request.made, request.logprobs, strict=True))
            meta["output_token_logprobs"] = [(one.logprob, token, None) for token, one in drawn]
            if given.get("top_logprobs_num"):
                meta["output_top_logprobs"] = [
                    [(v, t, None) for t, v in zip(one.top_tokens, one.top_values, strict=True)]
                    for _, one in drawn
                ]
        name = "TokenizerManager.add_logprob_to_meta_info"
        handled = recorded("sglang", "keys", "TokenizerManager._handle_batch_output")
        assert meta.keys() <= {*handled, *recorded("sglang", "keys", name)}
        return {"output_ids": request.made[:count], "meta_info": meta}


def module() -> ModuleType:
    """The package."""
    made = ModuleType("sglang")
    made.Engine = type("Engine", (Engine,), {})  # type: ignore[attr-defined]
    return made
