"""``tensorrt_llm`` and as much of ``torch`` as its adapter touches, around the toy engine."""

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from shards.engines.base import SamplingParams as Ours
from tests.engines.signatures.strict import bind, fields, record_class, recorded
from tests.engines.signatures.toy import VOCAB, Running, ToyEngine

KvCacheConfig = record_class("KvCacheConfig", fields("trtllm", "KvCacheConfig"))
LoraConfig = record_class("LoraConfig", fields("trtllm", "LoraConfig"))
LoRARequest = record_class("LoRARequest", fields("trtllm", "LoRARequest"))
SamplingParams = record_class("SamplingParams", fields("trtllm", "SamplingParams"))
CompletionOutput = record_class("CompletionOutput", fields("trtllm", "CompletionOutput"))
Logprob = record_class("Logprob", fields("trtllm", "Logprob"))


class RequestError(RuntimeError):
    """As in ``tensorrt_llm.llmapi``."""


class RequestOutput:
    """An asynchronous iterator over itself, as the real one is."""

    def __init__(self, llm: "LLM", request: Running) -> None:
        self._llm = llm
        self._request = request
        self._output = CompletionOutput(token_ids=[], logprobs=[])
        self._done = False

    @property
    def outputs(self) -> list[Any]:
        return [self._output]

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        self._llm.toy.abort(self._request.key)

    def __aiter__(self) -> "RequestOutput":
        return self

    async def __anext__(self) -> "RequestOutput":
        if self._done:
            raise StopAsyncIteration
        request = self._request
        try:
            piece = await request.hear()
        except ValueError as error:
            # Not finished, as in ``GenerationResultBase._handle_response``.
            raise RequestError(str(error)) from error
        if piece is None:
            self._done = True
            reason = "cancelled" if request.reason == "abort" else request.reason
            self._output.finish_reason = reason
            return self
        self._output.token_ids = request.made[:piece]
        if request.sampling.logprobs:
            self._output.logprobs = [
                self._llm.logprobs_of(token, one)
                for token, one in zip(request.made, request.logprobs, strict=True)
            ]
        return self


class LLM:
    """``tensorrt_llm.llmapi.LLM``."""

    broken = ""
    reports_drawn = True
    made: "list[LLM]" = []  # noqa: RUF012 - emptied by whoever makes one

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = bind("trtllm", "BaseLLM.__init__", args, kwargs)
        known = set(fields("trtllm", "BaseLlmArgs", "TorchLlmArgs"))
        if given.keys() - known:
            raise ValueError(f"LLM got invalid argument: {sorted(given.keys() - known)}")
        if self.broken:
            raise RuntimeError(self.broken)
        self.arguments = given
        self.toy = ToyEngine(given["kv_cache_config"].max_tokens, given["max_batch_size"])
        self.loras: list[Any] = []
        self.shut_down = 0
        LLM.made.append(self)

    def generate_async(self, *args: Any, **kwargs: Any) -> RequestOutput:
        given = bind("trtllm", "BaseLLM.generate_async", args, kwargs)
        assert given["streaming"] is True
        sampling, tokens = given["sampling_params"], given["inputs"]
        if sampling.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        if len(tokens) + sampling.max_tokens > self.arguments["max_seq_len"]:
            raise ValueError(f"The sum of prompt length ({len(tokens)}) and max_tokens is too long")
        self.loras.append(given["lora_request"])
        request = Running(
            key=str(len(self.loras)),
            tokens=list(tokens),
            count=sampling.max_tokens,
            sampling=self._sampling(sampling),
            bias=np.zeros(VOCAB, np.float32)
            if sampling.embedding_bias is None
            else sampling.embedding_bias,
            stops=frozenset(sampling.stop_token_ids or ())
            if sampling.include_stop_str_in_output
            else frozenset(),
        )
        self.toy.submit(request)
        return RequestOutput(self, request)

    def _sampling(self, given: Any) -> Ours:
        # Neither top_k nor top_p: greedy, whatever the temperature.
        greedy = given.top_k in (None, 1) and given.top_p in (None, 0.0)
        return Ours(
            temperature=0.0 if greedy else given.temperature,
            top_k=0 if greedy else given.top_k,
            top_p=1.0 if greedy else given.top_p,
            # One generator for all requests: another request, other draws.
            seed=len(self.loras),
            logprobs=bool(given.logprobs),
            top_logprobs=given.logprobs or 0,
        )

    def logprobs_of(self, token: int, found: Any) -> dict[int, Any]:
        """The likeliest tokens, and the drawn one in releases that report it."""
        ranked = zip(found.top_tokens, found.top_values, strict=True)
        told = {one: Logprob(logprob=value) for one, value in ranked}
        if self.reports_drawn:
            told[token] = Logprob(logprob=found.logprob)
        return told

    def shutdown(self) -> None:
        self.shut_down += 1


def torch_module(*, gpu: bool = True) -> ModuleType:
    """``torch`` as far as the adapter uses it: tensors are arrays here."""
    made = ModuleType("torch")
    made.float32 = np.float32  # type: ignore[attr-defined]
    made.zeros = np.zeros  # type: ignore[attr-defined]
    made.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        is_available=lambda: gpu, get_device_name=lambda _index: "Fake GPU"
    )
    return made


def modules(*, gpu: bool = True) -> dict[str, ModuleType]:
    """The package's modules, by name with ``__`` for a dot, and torch."""
    top = ModuleType("tensorrt_llm")
    llmapi = ModuleType("tensorrt_llm.llmapi")
    llm_args = ModuleType("tensorrt_llm.llmapi.llm_args")
    offers = {
        llmapi: {
            "LLM": type("LLM", (LLM,), {}),
            "SamplingParams": SamplingParams,
            "KvCacheConfig": KvCacheConfig,
            "LoRARequest": LoRARequest,
            "RequestError": RequestError,
        },
        llm_args: {"LoraConfig": LoraConfig},
    }
    for module, names in offers.items():
        for name, value in names.items():
            assert recorded("trtllm", "names", name)
            setattr(module, name, value)
    return {
        "tensorrt_llm": top,
        "tensorrt_llm__llmapi": llmapi,
        "tensorrt_llm__llmapi__llm_args": llm_args,
        "torch": torch_module(gpu=gpu),
    }
