"""``vllm`` with its Neuron plugin, as far as the adapter touches them, around the toy model.

A step is the plugin's: one prompt as a whole if any waits, or else one token for each request that
runs. What the plugin passes over (seeds, bias, min_p, min_tokens) is passed over here.
"""

import os
import threading
from types import ModuleType
from typing import Any

import numpy as np

from shards.engines.base import SamplingParams as Ours
from shards.sampling import Sampler
from tests.engines.signatures.strict import bind, fields, record_class, recorded
from tests.engines.signatures.toy import VOCAB, Running, logits

VLLM = "vllm-0.11"
PLUGIN = "vllm-neuron"
STARTED_S = 10.0
EngineArgs = record_class("EngineArgs", fields(VLLM, "EngineArgs"))
CompletionOutput = record_class("CompletionOutput", fields(VLLM, "CompletionOutput"))
RequestOutput = record_class(
    "RequestOutput", recorded(VLLM, "attributes", "RequestOutput.__init__")
)
Logprob = record_class("Logprob", fields(VLLM, "Logprob"))
Platform = record_class("Platform", fields(VLLM, "Platform"))
_Sampling = record_class(
    "SamplingParams", fields(VLLM, "SamplingParams"), temperature=1.0, top_p=1.0, top_k=0, n=1
)


class RequestOutputKind:
    """An enumeration, of which one member is used."""

    DELTA = "delta"


class SamplingParams(_Sampling):  # type: ignore[misc, valid-type]
    """Checked as in ``SamplingParams._verify_args``."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if self.temperature < 0.0 or not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.top_k < -1 or self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if 0.0 < self.temperature < 0.01:
            self.temperature = 0.01


class TokensPrompt(dict[str, Any]):
    """A dictionary with the recorded keys."""

    def __init__(self, **given: Any) -> None:
        assert given.keys() <= set(fields(VLLM, "TokensPrompt"))
        super().__init__(given)


class Core:
    """The client of an engine core in the same process."""

    def __init__(self) -> None:
        self.shut_down = 0

    def shutdown(self) -> None:
        self.shut_down += 1


class LLMEngine:
    """``vllm.LLMEngine``; what tests turn is in the fields of an engine, or of the class."""

    broken = ""
    draws_on_device = False
    made: "list[LLMEngine]" = []  # noqa: RUF012 - emptied by whoever makes one

    def __init__(self, arguments: Any) -> None:
        if self.broken:
            raise RuntimeError(self.broken)
        # Otherwise the engine's core is another process, and steps wait for it.
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        self.arguments = arguments
        self.compiled = os.environ["NEURON_COMPILED_ARTIFACTS"]
        self.engine_core = Core()
        self.waiting: list[Running] = []
        self.running: list[Running] = []
        self.given: list[Any] = []
        self.aborted: list[str] = []
        self.steps: list[list[str]] = []
        self.fault = ""
        self.open = threading.Event()
        self.open.set()
        self.thread = threading.get_ident()
        self._sampler = Sampler(VOCAB)
        LLMEngine.made.append(self)

    @classmethod
    def from_engine_args(cls, *args: Any, **kwargs: Any) -> "LLMEngine":
        return cls(bind(VLLM, "LLMEngine.from_engine_args", args, kwargs)["engine_args"])

    def _here(self) -> None:
        assert threading.get_ident() == self.thread, "it is not for several threads"

    def has_unfinished_requests(self) -> bool:
        self._here()
        return bool(self.waiting or self.running)

    def add_request(self, *args: Any, **kwargs: Any) -> None:
        self._here()
        given = bind(VLLM, "LLMEngine.add_request", args, kwargs)
        tokens, params = given["prompt"]["prompt_token_ids"], given["params"]
        if len(tokens) > self.arguments.max_model_len:
            raise ValueError(f"The decoder prompt (length {len(tokens)}) is longer than ...")
        assert params.ignore_eos
        assert params.output_kind is RequestOutputKind.DELTA
        assert len(tokens) >= 3, "the end of such a prompt is not found"
        barred = np.zeros(VOCAB, np.float32)
        if params.allowed_token_ids is not None:
            barred[:] = -np.inf
            barred[params.allowed_token_ids] = 0.0
        self.given.append(params)
        request = Running(
            key=given["request_id"],
            tokens=list(tokens),
            count=params.max_tokens,
            # One generator for all requests: another request, other draws.
            sampling=Ours(params.temperature, params.top_k, params.top_p, seed=len(self.given)),
            bias=barred,
            stops=frozenset(params.stop_token_ids or ()),
        )
        request.prompt_len = len(tokens)
        self.waiting.append(request)

    def abort_request(self, *args: Any, **kwargs: Any) -> None:
        self._here()
        keys = bind(VLLM, "LLMEngine.abort_request", args, kwargs)["request_ids"]
        for line in (self.waiting, self.running):
            for request in [one for one in line if one.key in keys]:
                line.remove(request)
                self.aborted.append(request.key)

    def step(self) -> list[Any]:
        self._here()
        assert self.open.wait(STARTED_S), "nobody lets the step go on"
        if self.fault:
            raise RuntimeError(self.fault)
        if self.waiting and len(self.running) < self.arguments.max_num_seqs:
            self.running.append(self.waiting.pop(0))
            turn = [self.running[-1]]
        else:
            turn = list(self.running)
        self.steps.append([request.key for request in turn])
        return [self._draw(request) for request in turn]

    def _draw(self, request: Running) -> Any:
        params = self.given[request.sampling.seed - 1]
        row = logits(request.tokens)
        (token,) = self._sampler.draw((row + request.bias)[None, :], [request]).tokens
        request.tokens.append(token)
        request.made.append(token)
        assert len(request.tokens) <= self.arguments.max_model_len
        reason = "stop" if token in request.stops else None
        if len(request.made) == request.count:
            reason = "length"
        if len(request.tokens) == self.arguments.max_model_len:
            reason = "length"
        if reason:
            self.running.remove(request)
        told = None
        if params.logprobs is not None and not self.draws_on_device:
            told = [_logprobs(row, token, params.logprobs)]
        output = CompletionOutput(token_ids=[token], logprobs=told, finish_reason=reason)
        return RequestOutput(request_id=request.key, outputs=[output], finished=bool(reason))


def _logprobs(row: np.ndarray, token: int, count: int) -> dict[int, Any]:
    """The drawn token and the likeliest ones, raw."""
    raw = row.astype(np.float64)
    raw -= np.log(np.exp(raw - raw.max()).sum()) + raw.max()
    best = np.argsort(-raw, kind="stable")[:count]
    return {int(one): Logprob(logprob=float(raw[one])) for one in (token, *best)}


def modules(*, taken: bool = True) -> dict[str, ModuleType]:
    """Both packages' modules, by name with ``__`` for a dot."""
    top, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    platforms, plugin = ModuleType("vllm.platforms"), ModuleType("vllm_neuron")
    offers = {
        top: {
            "LLMEngine": type("LLMEngine", (LLMEngine,), {}),
            "EngineArgs": EngineArgs,
            "TokensPrompt": TokensPrompt,
        },
        params: {"RequestOutputKind": RequestOutputKind},
        platforms: {
            "current_platform": Platform(
                device_control_env_var="NEURON_RT_VISIBLE_CORES" if taken else "CPU_VISIBLE"
            )
        },
    }
    for module, names in offers.items():
        for name, value in names.items():
            assert recorded(VLLM, "names", name)
            setattr(module, name, value)
    params.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    return {
        "vllm": top,
        "vllm__sampling_params": params,
        "vllm__platforms": platforms,
        "vllm_neuron": plugin,
    }
