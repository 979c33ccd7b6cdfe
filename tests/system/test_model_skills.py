"""LoRA adapters and embeddings of the embedded model, as a user has them: one command, a client."""

import math
from collections.abc import Iterator

import pytest
from openai import NotFoundError, OpenAI

from tests.engines.lora import write_adapter
from tests.system.server import REQUEST_S, Server, serving

PROMPT = "The railway came to the valley in the spring, and with it came"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("skills")
    # Exact: what an answer says does not depend on how much of its prompt was known.
    options = ("embeddings=1", "pooling=mean", "exact=1")
    arguments = tuple(part for option in options for part in ("--engine-option", option))
    for name, strength in (("none", 0.0), ("verse", 2.0)):
        path = write_adapter(folder / f"{name}.gguf", strength)
        arguments += ("--adapter", f"{name}={path}")
    with serving(folder, *arguments) as server:
        yield server


@pytest.fixture
def openai(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.rest}/v1", api_key="-", timeout=REQUEST_S) as client:
        yield client


def complete(client: OpenAI, model: str) -> str:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0)
    return answer.choices[0].text


def test_an_adapter_is_asked_for_by_its_name(server: Server, openai: OpenAI) -> None:
    base, verse = complete(openai, server.model), complete(openai, "verse")
    assert base != verse
    assert complete(openai, "none") == complete(openai, "tgi") == base
    parameters = {"max_new_tokens": 8, "adapter_id": "verse"}
    answer = server.client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
    assert answer.json()["generated_text"] == verse
    listed = {model.id: getattr(model, "parent", None) for model in openai.models.list()}
    assert listed == {server.model: None, "none": server.model, "verse": server.model}
    with pytest.raises(NotFoundError, match="is not served here"):
        complete(openai, "rhyme")


def test_embeddings_tell_what_a_text_is_about(openai: OpenAI) -> None:
    texts = [
        "The cat sleeps on the warm sofa in the living room.",
        "A kitten is napping on the couch in the living room.",
        "The central bank raised interest rates to fight inflation.",
    ]
    found = openai.embeddings.create(model="tgi", input=texts)
    cat, kitten, bank = (one.embedding for one in found.data)
    assert math.isclose(cosine(cat, cat), 1.0, abs_tol=1e-5)
    assert cosine(cat, kitten) > cosine(cat, bank)
    assert found.usage.prompt_tokens > 30


def cosine(left: list[float], right: list[float]) -> float:
    """Of vectors whose length is 1."""
    return sum(a * b for a, b in zip(left, right, strict=True))
