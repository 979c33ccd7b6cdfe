"""A valid body for every route that takes one, so that tests can spoil it.

``posts`` fails if the application has a route that is missing here: whoever adds one adds a body.
"""

from functools import lru_cache
from typing import Any

from router.api.rest.app import create_app
from router.config import Settings
from tests.service.fake_service import FakeFleet, FakeMetrics, FakeService

Body = dict[str, Any]
TOOL: Body = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
SAID = [{"role": "user", "content": "TEXT"}]
NATIVE: Body = {
    "inputs": "TEXT",
    "parameters": {
        "max_new_tokens": 3,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "typical_p": 0.9,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "seed": 3,
        "stop": ["stop"],
        "truncate": 20,
        "details": True,
        "decoder_input_details": False,
        "top_n_tokens": 2,
        "return_full_text": False,
        "watermark": True,
    },
}
DRAWN: Body = {
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "logit_bias": {"5": 1},
    "stop": ["stop"],
    "seed": 3,
    "n": 2,
    "user": "somebody",
    "stream": True,
    "stream_options": {"include_usage": True},
}
CHAT: Body = {
    "model": "tgi",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "TEXT"}]},
    ],
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [TOOL],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    **DRAWN,
}
COMPLETION: Body = {"model": "tgi", "prompt": ["TEXT", "x"], "logprobs": 2, **DRAWN}
RESPONSE: Body = {
    "model": "tgi",
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "TEXT"}]}],
    "instructions": "Be brief.",
    "max_output_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "stream": True,
    "store": False,
    "tools": [{"type": "function", **TOOL["function"]}],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "text": {"format": {"type": "text"}},
    "metadata": {"a": "b"},
}
MESSAGE: Body = {
    "model": "tgi",
    "max_tokens": 3,
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "TEXT"}]}],
    "temperature": 0.5,
    "top_k": 4,
    "top_p": 0.9,
    "stop_sequences": ["stop"],
    "stream": True,
    "tools": [{"name": "add", "input_schema": TOOL["function"]["parameters"]}],
    "tool_choice": {"type": "none"},
}
BODIES: dict[str, Body] = {
    "/": {**NATIVE, "stream": True},
    "/generate": NATIVE,
    "/generate_stream": NATIVE,
    "/tokenize": {"inputs": "TEXT"},
    "/chat_tokenize": {"messages": SAID},
    "/invocations": {**NATIVE, "stream": False},
    "/vertex": {"instances": [NATIVE, {"messages": SAID, "max_tokens": 3}]},
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/embeddings": {"model": "tgi", "input": ["TEXT", "x"], "encoding_format": "float"},
    "/v1/responses": RESPONSE,
    "/v1/messages": MESSAGE,
    "/v1/messages/count_tokens": {"model": "tgi", "messages": SAID},
}


@lru_cache
def posts() -> list[tuple[str, Body]]:
    """Every path of the application that takes a body, and a body that it takes."""
    fleet, metrics = FakeFleet(), FakeMetrics()
    app = create_app(FakeService(), fleet, metrics, Settings())  # type: ignore[arg-type]
    paths = {path for path, methods in app.openapi()["paths"].items() if "post" in methods}
    assert paths == BODIES.keys(), f"say in {__file__} what a good body for each route is"
    return sorted(BODIES.items())
