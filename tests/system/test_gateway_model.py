"""The embedded model through a gateway: every answer is its router's, in every field."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.server import Server, gateway, serving

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


def asked(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 24, **fields}


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", asked("What is the capital of France?", temperature=0)),
    ("/v1/chat/completions", asked("Name a person.", seed=7, response_format=PERSON)),
    ("/v1/completions", {"prompt": "The sky is", "max_tokens": 3, "echo": True, "logprobs": 2}),
    ("/generate", {"inputs": "Once 🙂", "parameters": {"max_new_tokens": 9, "details": True}}),
    ("/chat_tokenize", asked("Grüße, שלום")),
    ("/generate", {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "("}}}),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    folder: Path = tmp_path_factory.mktemp("model")
    # Exact: an answer does not depend on how much of its prompt was known.
    with (
        serving(folder, "--engine-option", "exact=1") as router,
        gateway(folder, router.grpc) as before,
    ):
        yield router, before


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_it_answers_as_its_router_does(
    pair: tuple[Server, Server], path: str, body: dict[str, Any]
) -> None:
    if path == "/v1/completions":
        body = {**body, "temperature": 0}
    answers = [server.client.post(path, json=body) for server in pair]
    assert answers[0].status_code == answers[1].status_code
    values = [answer.json() for answer in answers]
    for value in values:
        if isinstance(value, dict):
            # What names an answer, and how much of its prompt others had left resident.
            for name in ("id", "created", "usage"):
                value.pop(name, None)
    assert values[1] == near(values[0])


def near(value: Any) -> Any:
    """The same but for rounding, which depends on where in memory a sequence lies.

    A quantised model makes up to 0.1 of that in a log probability.
    """
    match value:
        case dict():
            return {name: near(member) for name, member in value.items()}
        case list():
            return [near(member) for member in value]
        case float():
            return pytest.approx(value, abs=0.2)
    return value
