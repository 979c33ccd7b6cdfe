"""The embedded model on llama.cpp, asked in every way there is; and its worker killed."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from huggingface_hub import InferenceClient
from openai import OpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from router.v1.router_pb2 import ChatMessage, ChatRequest, FinishReason, Parameters
from router.v1.router_pb2_grpc import InferenceStub
from tests.system.server import REQUEST_S, Server, alive, eventually, serving

# Without the second sentence, and with the system message of its own template, this small model
# answers in bad French; llama.cpp's own programs say the same.
QUESTION = "What is the capital of France?"
MESSAGES: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": QUESTION}]
TEMPLATED = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
CHAT = {"model": "tgi", "messages": MESSAGES, "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model")) as server:
        yield server


@pytest.fixture
def openai(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.rest}/v1", api_key="-", timeout=REQUEST_S) as client:
        yield client


def events(response: httpx.Response) -> Iterator[dict[str, object]]:
    """The JSON objects of a stream of server-sent events."""
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


def test_tgi_generate(server: Server) -> None:
    answer = server.client.post(
        "/generate", json={"inputs": TEMPLATED, "parameters": {"max_new_tokens": 24}}
    )
    assert answer.status_code == 200
    assert "Paris" in answer.json()["generated_text"]


def test_tgi_generate_stream(server: Server) -> None:
    body = {"inputs": TEMPLATED, "parameters": {"max_new_tokens": 24}}
    with server.client.stream("POST", "/generate_stream", json=body) as response:
        assert response.status_code == 200
        seen = list(events(response))
    assert len(seen) > 3
    assert "Paris" in str(seen[-1]["generated_text"])


def test_openai_chat(server: Server) -> None:
    answer = server.client.post("/v1/chat/completions", json=CHAT).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] > 10


def test_grpc_chat(server: Server) -> None:
    request = ChatRequest(
        messages=[ChatMessage(role="user", content=QUESTION)],
        parameters=Parameters(max_tokens=24, temperature=0),
    )
    with grpc.insecure_channel(server.grpc) as channel:
        answer = list(InferenceStub(channel).Chat(request, timeout=REQUEST_S))
    assert "Paris" in "".join(part.text for part in answer)
    assert answer[-1].finish.reason == FinishReason.FINISH_REASON_EOS_TOKEN
    assert answer[-1].finish.generated_tokens == sum(len(part.token_ids) for part in answer)


def test_openai_client(openai: OpenAI) -> None:
    answer = openai.chat.completions.create(
        model="tgi", messages=MESSAGES, max_tokens=24, temperature=0
    )
    assert "Paris" in str(answer.choices[0].message.content)


def test_openai_client_streaming(openai: OpenAI) -> None:
    with openai.chat.completions.create(
        model="tgi", messages=MESSAGES, max_tokens=24, temperature=0, stream=True
    ) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 3
    assert "Paris" in "".join(pieces)


def test_openai_client_finds_the_model(openai: OpenAI, server: Server) -> None:
    assert [model.id for model in openai.models.list()] == [server.model]


def test_huggingface_client_text_generation(server: Server) -> None:
    client = InferenceClient(server.rest, timeout=REQUEST_S)
    assert "Paris" in client.text_generation(TEMPLATED, max_new_tokens=24)
    pieces = list(client.text_generation(TEMPLATED, max_new_tokens=24, stream=True))
    assert len(pieces) > 3
    assert "Paris" in "".join(pieces)


def test_huggingface_client_chat(server: Server) -> None:
    client = InferenceClient(base_url=server.rest, timeout=REQUEST_S)
    answer = client.chat_completion(
        [{"role": "user", "content": QUESTION}], max_tokens=24, temperature=0
    )
    assert "Paris" in str(answer.choices[0].message.content)


def story(**parameters: object) -> dict[str, object]:
    """A body that asks for a long text."""
    return {"inputs": "Once upon a time", "parameters": {"details": True, **parameters}}


def broken(server: Server, body: dict[str, object]) -> list[dict[str, Any]]:
    """The events of a stream whose worker is killed when it has begun."""
    pid = server.worker_pid()
    with server.client.stream("POST", "/generate_stream", json=body) as response:
        stream = events(response)
        seen = [next(stream)]
        assert "token" in seen[0]
        os.kill(pid, signal.SIGKILL)
        seen += stream
    eventually(lambda: not alive(pid))
    return seen


def test_a_long_answer_goes_on_when_the_worker_is_killed(tmp_path: Path) -> None:
    """Exactly where it was, in the mode in which logits do not depend on how they are computed."""
    greedy = story(max_new_tokens=80)
    seeded = story(max_new_tokens=80, do_sample=True, temperature=0.8, top_p=0.9, seed=5)
    with serving(tmp_path, "--engine-option", "exact=1") as server:
        for body in (greedy, seeded):
            unbroken = server.client.post("/generate", json=body).json()
            seen = broken(server, body)
            tokens = [token["id"] for token in unbroken["details"]["tokens"]]
            assert len(tokens) == 80
            assert [event["token"]["id"] for event in seen] == tokens
            assert seen[-1]["generated_text"] == unbroken["generated_text"]


def test_a_long_answer_breaks_off_if_that_is_wanted_and_the_next_one_is_whole(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, "--no-resume-streams") as server:
        last = broken(server, story(max_new_tokens=2000))[-1]
        assert last["error_type"] == "generation"
        assert "worker" in str(last["error"])
        answer = server.client.post("/v1/chat/completions", json=CHAT).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]


def test_a_ready_server_is_told_by_the_command(tmp_path: Path) -> None:
    """The command that people type, with a model file of their own and TGI's variables."""
    from deploy.models import embedded

    model = tmp_path / "mine.gguf"
    model.symlink_to(str(embedded().path))
    with serving(tmp_path, str(model), "--max-total-tokens", "512") as server:
        info = server.client.get("/info").json()
    assert info["model_id"] == "mine"
    assert info["max_total_tokens"] == 512
