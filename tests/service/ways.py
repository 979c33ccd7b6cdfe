"""Every way to ask for text, over every face of a router: all of them say the same.

The ways that take a conversation get what the user says; those that take a prompt get the layout
that the scripted engine's chat template makes of it. So the answers can be compared.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio

from router.fmaas.v1 import generation_pb2 as fmaas
from router.fmaas.v1.generation_pb2_grpc import GenerationServiceStub
from router.kserve.v1 import inference_pb2 as kserve
from router.kserve.v1.inference_pb2_grpc import GRPCInferenceServiceStub
from router.v1 import router_pb2 as pb
from router.v1.router_pb2_grpc import InferenceStub
from tests.service.fakes import PATIENCE_S
from tests.service.test_rest_router import House

TEMPERATURE = 0.75
"""The same in 32 bits and in 64."""

Body = dict[str, Any]


@dataclass(frozen=True)
class Wish:
    """What a user says, how many tokens are wanted, and how they are drawn: None is greedy."""

    text: str
    tokens: int
    seed: int | None = None

    @property
    def prompt(self) -> str:
        """The conversation as the template lays it out."""
        return f"<|im_start|>user\n{self.text}<|im_end|>\n<|im_start|>assistant\n"

    @property
    def messages(self) -> list[Body]:
        return [{"role": "user", "content": self.text}]

    def native(self) -> Body:
        drawn = {} if self.seed is None else {"temperature": TEMPERATURE, "seed": self.seed}
        parameters = {"max_new_tokens": self.tokens, "details": True, **drawn}
        return {"inputs": self.prompt, "parameters": {"do_sample": bool(drawn), **parameters}}

    def drawn(self) -> Body:
        return {
            "temperature": 0 if self.seed is None else TEMPERATURE,
            **({} if self.seed is None else {"seed": self.seed}),
        }

    def openai(self) -> Body:
        return {"max_tokens": self.tokens, **self.drawn()}

    def parameters(self) -> pb.Parameters:
        return pb.Parameters(max_tokens=self.tokens, **self.drawn())


@dataclass(frozen=True)
class Said:
    """An answer, the number of pieces it came in, and the counts of tokens that were told."""

    text: str
    pieces: int = 1
    prompt: int | None = None
    completion: int | None = None


Way = Callable[[House, Wish], Awaitable[Said]]


async def whole(house: House, path: str, body: Body) -> Any:
    """The JSON of an answer with status 200."""
    answer = await house.post(path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@asynccontextmanager
async def streaming(house: House, path: str, body: Body) -> AsyncIterator[AsyncIterator[Any]]:
    """The JSON of the events of a stream, as they come."""
    async with house.client.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        yield _events(answer.aiter_bytes())


async def _events(raw: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    rest = b""
    async for piece in raw:
        # By bytes: many characters end a line for Python, and only this one in an event.
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                yield json.loads(data)


async def events(house: House, path: str, body: Body) -> list[Any]:
    """All events of a stream, none of which is an error."""
    async with streaming(house, path, body) as stream:
        found = [event async for event in stream]
    assert not any(event.get("error") for event in found), found[-1]
    return found


def joined(pieces: list[str], prompt: int | None = None, completion: int | None = None) -> Said:
    return Said("".join(pieces), len(pieces), prompt, completion)


async def native(house: House, wish: Wish) -> Said:
    answer = await house.post("/generate", wish.native())
    value = answer.json()
    count = value["details"]["generated_tokens"]
    assert len(value["details"]["tokens"]) == count
    return Said(value["generated_text"], 1, int(answer.headers["x-prompt-tokens"]), count)


async def compat(house: House, wish: Wish) -> Said:
    body = wish.native()
    body["parameters"]["return_full_text"] = True
    (value,) = await whole(house, "/", body)
    text = value["generated_text"]
    assert text.startswith(wish.prompt)
    return Said(text.removeprefix(wish.prompt), 1, None, value["details"]["generated_tokens"])


async def native_stream(house: House, wish: Wish) -> Said:
    found = await events(house, "/generate_stream", wish.native())
    details = found[-1]["details"]
    shown = [event["token"]["text"] for event in found if not event["token"]["special"]]
    # A character that the limit cut in two is in the whole alone.
    assert found[-1]["generated_text"].startswith("".join(shown))
    assert details["generated_tokens"] == len(found)
    text = found[-1]["generated_text"]
    return Said(text, len(found), details["input_length"], len(found))


async def vertex(house: House, wish: Wish) -> Said:
    parameters = wish.native()
    chat = {"messages": wish.messages, **wish.openai()}
    answer = await whole(house, "/vertex", {"instances": [parameters, chat]})
    first, second = answer["predictions"]
    assert first == second
    return Said(first)


def usage_of(value: Body) -> tuple[int, int]:
    """Tokens of the prompt and of the answer, which add up."""
    usage = value["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    return usage["prompt_tokens"], usage["completion_tokens"]


async def completions(house: House, wish: Wish) -> Said:
    answer = await whole(house, "/v1/completions", {"prompt": wish.prompt, **wish.openai()})
    return Said(answer["choices"][0]["text"], 1, *usage_of(answer))


async def completions_twice(house: House, wish: Wish) -> Said:
    """Two answers to each of two equal prompts, echoed; greedy ones are equal."""
    body = {"prompt": [wish.prompt] * 2, "n": 2, "echo": True, **wish.openai()}
    answer = await whole(house, "/v1/completions", body)
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(texts) == 4
    assert all(text.startswith(wish.prompt) for text in texts)
    assert len(set(texts)) == 1 or wish.seed is not None
    return Said(texts[0].removeprefix(wish.prompt))


async def completions_stream(house: House, wish: Wish) -> Said:
    body = {"prompt": wish.prompt, "stream": True, **wish.openai()}
    body["stream_options"] = {"include_usage": True}
    *found, last = await events(house, "/v1/completions", body)
    return joined([event["choices"][0]["text"] for event in found], *usage_of(last))


async def completions_twice_stream(house: House, wish: Wish) -> Said:
    body = {"prompt": wish.prompt, "n": 2, "stream": True, **wish.openai()}
    texts = {0: "", 1: ""}
    for event in await events(house, "/v1/completions", body):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts[0] == texts[1] or wish.seed is not None
    return Said(texts[0])


async def chat(house: House, wish: Wish) -> Said:
    body = {"messages": wish.messages, **wish.openai()}
    answer = await whole(house, "/v1/chat/completions", body)
    return Said(answer["choices"][0]["message"]["content"], 1, *usage_of(answer))


async def chat_stream(house: House, wish: Wish) -> Said:
    body = {"messages": wish.messages, "stream": True, **wish.openai()}
    body["stream_options"] = {"include_usage": True}
    *found, last = await events(house, "/v1/chat/completions", body)
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in found]
    return joined(pieces, *usage_of(last))


async def invocations(house: House, wish: Wish) -> Said:
    (answer,) = await whole(house, "/invocations", wish.native())
    said = await whole(house, "/invocations", {"messages": wish.messages, **wish.openai()})
    other = await whole(house, "/invocations", {"prompt": wish.prompt, **wish.openai()})
    texts = {said["choices"][0]["message"]["content"], other["choices"][0]["text"]}
    assert texts == {answer["generated_text"].removeprefix(wish.prompt)}
    return Said(texts.pop())


async def responses(house: House, wish: Wish) -> Said:
    body = {"input": wish.text, "max_output_tokens": wish.tokens, "temperature": 0}
    answer = await whole(house, "/v1/responses", body)
    return _response(answer)


def _response(answer: Body, pieces: int = 1) -> Said:
    parts = [part for item in answer["output"] for part in item.get("content", ())]
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    text = "".join(part["text"] for part in parts)
    return Said(text, pieces, usage["input_tokens"], usage["output_tokens"])


async def responses_stream(house: House, wish: Wish) -> Said:
    body = {"input": wish.text, "max_output_tokens": wish.tokens, "temperature": 0}
    found = await events(house, "/v1/responses", {**body, "stream": True})
    deltas = [event["delta"] for event in found if event["type"].endswith("output_text.delta")]
    said = _response(found[-1]["response"], len(deltas))
    assert said.text == "".join(deltas)
    return said


async def messages(house: House, wish: Wish) -> Said:
    body = {"messages": wish.messages, "max_tokens": wish.tokens, "temperature": 0, "model": "tgi"}
    answer = await whole(house, "/v1/messages", body)
    text = "".join(block["text"] for block in answer["content"])
    usage = answer["usage"]
    return Said(text, 1, usage["input_tokens"], usage["output_tokens"])


async def messages_stream(house: House, wish: Wish) -> Said:
    body = {"messages": wish.messages, "max_tokens": wish.tokens, "temperature": 0, "model": "tgi"}
    found = await events(house, "/v1/messages", {**body, "stream": True})
    by_kind: dict[str, list[Body]] = {}
    for event in found:
        by_kind.setdefault(event["type"], []).append(event)
    pieces = [event["delta"]["text"] for event in by_kind.get("content_block_delta", ())]
    start, end = by_kind["message_start"][0]["message"], by_kind["message_delta"][-1]
    return joined(pieces, start["usage"]["input_tokens"], end["usage"]["output_tokens"])


@asynccontextmanager
async def channel(house: House) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(house.grpc) as found:
        yield found


async def _inference(call: Any) -> Said:
    answers = [answer async for answer in call]
    finish = answers[-1].finish
    assert finish.generated_tokens == sum(len(answer.token_ids) for answer in answers)
    pieces = [answer.text for answer in answers]
    return joined(pieces, finish.prompt_tokens, finish.generated_tokens)


async def grpc_generate(house: House, wish: Wish) -> Said:
    request = pb.GenerateRequest(text=wish.prompt, parameters=wish.parameters())
    async with channel(house) as found:
        return await _inference(InferenceStub(found).Generate(request, timeout=PATIENCE_S))


async def grpc_chat(house: House, wish: Wish) -> Said:
    said = [pb.ChatMessage(role="user", content=wish.text)]
    request = pb.ChatRequest(messages=said, parameters=wish.parameters())
    async with channel(house) as found:
        return await _inference(InferenceStub(found).Chat(request, timeout=PATIENCE_S))


def _fmaas(wish: Wish) -> fmaas.Parameters:
    stopping = fmaas.StoppingCriteria(max_new_tokens=wish.tokens)
    if wish.seed is None:
        return fmaas.Parameters(method=fmaas.GREEDY, stopping=stopping)
    sampling = fmaas.SamplingParameters(temperature=TEMPERATURE, seed=wish.seed)
    return fmaas.Parameters(method=fmaas.SAMPLE, sampling=sampling, stopping=stopping)


async def tgis(house: House, wish: Wish) -> Said:
    """Two equal prompts in one call."""
    request = fmaas.BatchedGenerationRequest(
        requests=[fmaas.GenerationRequest(text=wish.prompt)] * 2, params=_fmaas(wish)
    )
    async with channel(house) as found:
        answer = await GenerationServiceStub(found).Generate(request, timeout=PATIENCE_S)
    first, second = answer.responses
    assert first.text == second.text
    return Said(first.text, 1, first.input_token_count, first.generated_token_count)


async def tgis_stream(house: House, wish: Wish) -> Said:
    request = fmaas.SingleGenerationRequest(
        request=fmaas.GenerationRequest(text=wish.prompt), params=_fmaas(wish)
    )
    async with channel(house) as found:
        call = GenerationServiceStub(found).GenerateStream(request, timeout=PATIENCE_S)
        answers = [answer async for answer in call]
    first, last = answers[0], answers[-1]
    pieces = [answer.text for answer in answers]
    return joined(pieces, first.input_token_count, last.generated_token_count)


def _tensors(wish: Wish, stream: bool) -> kserve.ModelInferRequest:
    request = kserve.ModelInferRequest(model_name="m")
    sampling = json.dumps({"max_tokens": wish.tokens, **wish.drawn()})
    for name, text in (("text_input", wish.prompt), ("sampling_parameters", sampling)):
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(text.encode())
    for name, value in (("stream", stream), ("exclude_input_in_output", True)):
        tensor = request.inputs.add(name=name, datatype="BOOL", shape=[1])
        tensor.contents.bool_contents.append(value)
    return request


def _tensor(answer: kserve.ModelInferResponse) -> str:
    """The text of an answer: bytes behind their length, in four bytes, least significant first."""
    if not answer.raw_output_contents:
        values = [tensor.contents.bytes_contents for tensor in answer.outputs]
        return "".join(value.decode() for found in values for value in found)
    return "".join(raw[4:].decode() for raw in answer.raw_output_contents)


async def triton(house: House, wish: Wish) -> Said:
    async with channel(house) as found:
        stub = GRPCInferenceServiceStub(found)
        answer = await stub.ModelInfer(_tensors(wish, False), timeout=PATIENCE_S)
    return Said(_tensor(answer))


async def triton_stream(house: House, wish: Wish) -> Said:
    async def requests() -> AsyncIterator[kserve.ModelInferRequest]:
        yield _tensors(wish, True)

    async with channel(house) as found:
        stub = GRPCInferenceServiceStub(found)
        call = stub.ModelStreamInfer(requests(), timeout=PATIENCE_S)
        answers = [answer async for answer in call]
    assert not any(answer.error_message for answer in answers)
    return joined([_tensor(answer.infer_response) for answer in answers])


WAYS: tuple[Way, ...] = (
    *(native, compat, native_stream, vertex, invocations),
    *(completions, completions_twice, completions_stream, completions_twice_stream),
    *(chat, chat_stream, responses, responses_stream, messages, messages_stream),
    *(grpc_generate, grpc_chat, tgis, tgis_stream, triton, triton_stream),
)
UNSEEDED: tuple[Way, ...] = (responses, responses_stream, messages, messages_stream)
"""Protocols without a seed."""
