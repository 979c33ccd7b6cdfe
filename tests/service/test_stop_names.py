"""Stop strings that are the names of special tokens, on every face: those tokens are no text."""

from pathlib import Path
from typing import Any

import pytest

from tests.service.test_rest_router import house_in

WORKER = {"answer": "Now and<|im_start|> then more"}
NAME = "<|im_start|>"
GREEDY = {"model": "tgi", "max_tokens": 50, "temperature": 0}
CHAT = {**GREEDY, "messages": [{"role": "user", "content": "x"}]}
ASKED: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": "x", "parameters": {"stop": ["nowhere", NAME], "details": True}},
    "/v1/completions": {**GREEDY, "prompt": "x", "stop": [NAME]},
    "/v1/chat/completions": {**CHAT, "stop": NAME},
    "/v1/messages": {**CHAT, "stop_sequences": ["nowhere", NAME]},
}


def told(path: str, answer: dict[str, Any]) -> tuple[str, str]:
    """The text of an answer, and why it ended."""
    match path:
        case "/generate":
            return answer["generated_text"], answer["details"]["finish_reason"]
        case "/v1/completions":
            return answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
        case "/v1/chat/completions":
            choice = answer["choices"][0]
            return choice["message"]["content"], choice["finish_reason"]
        case _:
            assert answer["stop_sequence"] == NAME
            return answer["content"][0]["text"], answer["stop_reason"]


@pytest.mark.parametrize("path", ASKED)
async def test_the_name_of_a_special_token_ends_the_answer(tmp_path: Path, path: str) -> None:
    async with house_in(tmp_path, WORKER) as house:
        text, reason = told(path, (await house.post(path, ASKED[path])).json())
        assert text == "Now and"
        openai = path.startswith("/v1/c")
        assert reason == ("stop" if openai else "stop_sequence")


@pytest.mark.parametrize("kept", [False, True])
async def test_it_is_cut_where_special_tokens_show(tmp_path: Path, kept: bool) -> None:
    asked = ASKED["/v1/completions"] | {"skip_special_tokens": False}
    async with house_in(tmp_path, WORKER) as house:
        body = asked | {"include_stop_str_in_output": kept}
        text, reason = told("/v1/completions", (await house.post("/v1/completions", body)).json())
        assert text == "Now and" + (NAME if kept else "")
        assert reason == "stop"
