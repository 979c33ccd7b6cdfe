"""``roundhouse serve`` with torch's own environment: two engines at once, and ranks of one.

Run by the project's own interpreter; torch is found where ``roundhouse engines install`` puts it.
"""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

from deploy.interpreters import installed_apart
from tests.heavy.models import smollm2_folder
from tests.system.server import Server, alive, eventually
from tests.system.test_serve_groups import DOWN_S, groups_up, steps, watched, with_words

QUESTION = "What is the capital of France? Answer in one sentence."
BACK_S = 60.0
WORDS = ("Rain", "Steel", "Bread", "Music", "Paper", "Light", "Trade", "Sleep")


def ask(server: Server, tokens: int, question: str = QUESTION) -> str:
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": tokens,
    }
    answer = server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def ask_many(server: Server) -> list[str]:
    """Eight at once, so that there is work for every group.

    No two begin alike: a request goes where its prefix is, as long as there is room.
    """
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda word: ask(server, 24, f"{word}? Explain it."), WORDS))


def test_llamacpp_and_torch_serve_one_model_and_either_goes_on_alone(tmp_path: Path) -> None:
    """The same weights as GGUF and as safetensors, whose tokenizer files differ in no id."""
    assert installed_apart("torch"), "roundhouse engines install torch"
    groups = (
        *("--group", "llamacpp,threads=1"),
        *("--group", f"torch,threads=1,model={smollm2_folder()}"),
    )
    with watched(tmp_path, *groups) as server:
        eventually(lambda: groups_up(server) == 2)
        assert len(server.client.get("/v1/models").json()["data"]) == 1
        assert "Paris" in ask(server, 24)
        assert all(ask_many(server))
        before = steps(server)
        assert before["llamacpp"] > 0
        assert before["torch"] > 0
        (victim,) = with_words(server, "--engine torch")
        os.kill(victim, signal.SIGKILL)
        assert all(ask_many(server))
        assert steps(server)["llamacpp"] > before["llamacpp"]
        eventually(lambda: groups_up(server) == 2, BACK_S)
        (victim,) = with_words(server, "--engine llamacpp")
        os.kill(victim, signal.SIGKILL)
        assert all(ask_many(server))
        assert steps(server)["torch"] > before["torch"]


def test_three_ranks_of_torch_die_together_and_come_back(tmp_path: Path) -> None:
    assert installed_apart("torch"), "roundhouse engines install torch"
    ranks = ("--engine", "torch", "--num-shard", "3", "--threads", "1", "--dtype", "float32")
    with watched(tmp_path, str(smollm2_folder()), *ranks) as server:
        answer = ask(server, 24)
        assert "Paris" in answer
        first = with_words(server, "--engine torch")
        assert len(first) == 3
        began = monotonic()
        os.kill(first[1], signal.SIGKILL)
        eventually(lambda: not any(map(alive, first)), DOWN_S)
        assert monotonic() - began < DOWN_S
        assert ask(server, 24) == answer
