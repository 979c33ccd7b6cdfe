"""``text-generation-launcher`` as processes: started as TGI's own tests and users start it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from shards.engines.base import Watermark
from shards.watermark import detect
from tests.system.server import end, read_lines

LAUNCHER = (sys.executable, "-m", "deploy.tgi_launcher")
# What a container sets, and TGI's own integration tests.
SURROUNDINGS = {
    "HOSTNAME": "3f2a9c",
    "LOG_LEVEL": "info,text_generation_router=debug",
    "PREFILL_CHUNKING": "1",
}


class Launched:
    """A running server, and what it has written to standard error by now."""

    def __init__(self, ready: dict[str, str], errors: Path) -> None:
        self.model = ready["model"]
        self.client = httpx.Client(base_url=ready["rest"], timeout=60)
        self._errors = errors

    @property
    def told(self) -> list[str]:
        return [line for line in self._errors.read_text().splitlines() if "launcher: " in line]


@contextmanager
def launched(folder: Path, *arguments: str, **env: str) -> Iterator[Launched]:
    errors = folder / "stderr"
    with errors.open("w") as stream:
        process = subprocess.Popen(
            [*LAUNCHER, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=stream, text=True, env=os.environ | SURROUNDINGS | env,
        )  # fmt: skip
        try:
            try:
                (*_, line) = read_lines(process, lambda line: line.startswith("{"))
            except AssertionError as error:
                raise AssertionError(errors.read_text()) from error
            server = Launched(json.loads(line), errors)
            with server.client:
                yield server
        finally:
            end(process)
    assert process.returncode == 0


def refused(*arguments: str, **env: str) -> tuple[int, str]:
    """The exit status and the one line of a start that fails."""
    found = subprocess.run(
        [*LAUNCHER, *arguments], check=False, capture_output=True, text=True, timeout=60,
        env=os.environ | env,
    )  # fmt: skip
    (line,) = found.stderr.splitlines()
    assert found.stdout == ""
    return found.returncode, line


def test_it_starts_as_tgis_integration_tests_start_it(tmp_path: Path) -> None:
    """Every flag of their conftest.py that has a meaning here or only tunes, and their probe."""
    arguments = (
        *("--model-id", "org/model", "--port", "0", "--master-port", "10001"),
        *("--shard-uds-path", "/tmp/tgi-tests-model-1-None-server", "--num-shard", "1"),
        *("--max-input-length", "40", "--max-total-tokens", "64", "--cuda-graphs", "0"),
        *("--max-batch-prefill-tokens", "50", "--disable-grammar-support", "--json-output"),
    )
    with launched(tmp_path, *arguments, ENGINE="scripted") as server:
        body = {"inputs": "test", "parameters": {"max_new_tokens": 1}}
        assert server.client.post("/", json=body).status_code == 200
        info = server.client.get("/info").json()
        assert (info["model_id"], info["max_input_tokens"]) == ("org/model", 40)
        assert info["max_total_tokens"] == 64
        grammar = {"type": "regex", "value": "a"}
        answer = server.client.post("/generate", json=body | {"parameters": {"grammar": grammar}})
        assert answer.status_code == 422
        assert "grammar" in answer.json()["error"]
    names = "--cuda-graphs, --shard-uds-path, --master-port, PREFILL_CHUNKING"
    (warning,) = server.told
    assert json.loads(warning)["message"] == (
        f"text-generation-launcher: warning: without effect here: {names}"
    )


def test_a_gguf_file_is_served_whatever_type_tgi_was_told(tmp_path: Path) -> None:
    with launched(tmp_path, "--port", "0", "--json-output", DTYPE="float16") as server:
        body = {"inputs": "test", "parameters": {"max_new_tokens": 1}}
        assert server.client.post("/generate", json=body).status_code == 200
    (warning,) = server.told
    assert "PREFILL_CHUNKING, --dtype (a GGUF file says itself: MODEL_FILE picks one)" in warning


def test_variables_are_read_and_what_is_typed_wins(tmp_path: Path) -> None:
    env = {
        "MODEL_ID": "org/model",
        "PORT": "0",
        "MAX_TOTAL_TOKENS": "99",
        "MAX_BEST_OF": "7",
        "JSON_OUTPUT": "true",
        "API_KEY": "secret",
        "SHARDED": "false",
        "TRUST_REMOTE_CODE": "false",
        "USAGE_STATS": "off",
        "ENABLE_PREFILL_LOGPROBS": "true",
        "PREFILL_CHUNKING": "",
        "ENGINE": "scripted",
    }
    with launched(tmp_path, "--max-total-tokens", "77", "-e", **env) as server:
        info = server.client.get("/info").json()
        assert (info["max_total_tokens"], info["max_best_of"]) == (77, 7)
        assert info["model_id"] == "org/model"
        assert server.client.post("/generate", json={"inputs": "x"}).status_code == 401
    shown = (tmp_path / "stderr").read_text()
    assert "Runtime environment:" in shown
    assert "--api-key ..." in shown
    assert "secret" not in shown
    assert server.told == []


def test_answers_are_marked_as_flags_and_variables_say(tmp_path: Path) -> None:
    # The scripted engine prefers one token at each place by 4: this is stronger.
    flags = ("--model-id", "org/model", "--port", "0", "--watermark-delta", "12", "--json-output")
    env = {"WATERMARK_GAMMA": "0.25", "WATERMARK_KEY": "77", "ENGINE": "scripted"}
    with launched(tmp_path, *flags, **env) as server:

        def tokens(watermark: bool) -> list[int]:
            parameters = {"max_new_tokens": 24, "details": True, "watermark": watermark}
            body = {"inputs": "test", "parameters": parameters}
            details = server.client.post("/generate", json=body).json()["details"]
            return [token["id"] for token in details["tokens"]]

        mark = Watermark(gamma=0.25, delta=12.0, key=77)
        found = detect(tokens(True), mark)
        assert found.green == found.scored > 20
        assert detect(tokens(False), mark).z < 3
    assert not any("watermark" in line for line in server.told)


@pytest.mark.parametrize(
    ("arguments", "env", "status", "told"),
    [
        (("--trust-remote-code",), {}, 1, "--trust-remote-code: code from the hub is never run"),
        ((), {"ROPE_SCALING": "dynamic"}, 1, "--rope-scaling: "),
        (("--quantize", "gptq"), {"ENGINE": "torch"}, 1, "ENGINE=vllm"),
        (("--quantize", "zip"), {}, 2, "zip"),
        (("--no-such-flag",), {}, 2, "--no-such-flag"),
        (("--model-id", "./none.gguf"), {}, 1, "./none.gguf does not exist"),
        (("--port", "high"), {"ENGINE": "scripted"}, 1, "port (TCP port)"),
        (("--watermark-gamma", "1"), {"ENGINE": "scripted"}, 1, "watermark_gamma (share of the"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: tuple[str, ...], env: dict[str, str], status: int, told: str
) -> None:
    code, line = refused(*arguments, **env)
    assert code == status
    assert line.startswith("text-generation-launcher: error: ")
    assert told in line


def test_the_embedded_model_does_what_tgis_clients_ask(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}!"}))
    arguments = ("--port", "0", "--json-output", "--tokenizer-config-path", str(config))
    with launched(tmp_path, *arguments, ENABLE_PREFILL_LOGPROBS="true") as server:

        def generate(inputs: str, **parameters: object) -> dict[str, Any]:
            body = {"inputs": inputs, "parameters": parameters}
            answer = server.client.post("/generate", json=body)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        prompt = "The capital of France is"
        answer = generate(prompt, max_new_tokens=4, decoder_input_details=True)
        assert "Paris" in answer["generated_text"]
        details = answer["details"]
        assert details["generated_tokens"] == 4
        assert "".join(token["text"] for token in details["prefill"]) == prompt
        first, *others = (token["logprob"] for token in details["prefill"])
        assert first is None
        assert all(logprob < 0 for logprob in others)

        regex = {"type": "regex", "value": "[0-9]{2}-(red|blue)"}
        text = generate("A code:", max_new_tokens=20, grammar=regex)["generated_text"]
        assert re.fullmatch(regex["value"], text)
        schema = {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"enum": [1, 2]}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
        shape = {"type": "json", "value": json.dumps(schema)}
        text = generate("A person:", max_new_tokens=60, grammar=shape)["generated_text"]
        assert json.loads(text).keys() == {"name", "age"}

        body = {"messages": [{"role": "user", "content": "Hi"}]}
        laid_out = server.client.post("/chat_tokenize", json=body).json()
        assert laid_out["templated_text"] == "Hi!"
