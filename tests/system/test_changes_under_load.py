"""Groups that come, go, fail and die under streams of every kind: no token is lost or repeated.

What is done, and to whom, is drawn from a seed; when it meets which stream is chance.
"""

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from random import Random
from typing import Any

import grpc
import pytest

from deploy.control import control_socket
from router.v1 import groups_pb2, router_pb2
from router.v1.groups_pb2_grpc import GroupsStub
from router.v1.router_pb2_grpc import InferenceStub
from tests.system.server import Server, alive, children, eventually, gateway, serving

SEEDS = (1,)  # a soak takes more of them
STREAMS = 10
PATIENCE_S = 60.0
SOUND = "scripted,engine-option=step_ms=10"
FAULTY = "scripted,engine-option=nonsense=1"
CRASHING = "scripted,engine-option=crash_after_steps=25"
WEDGING = "scripted,engine-option=wedge_after_steps=25"
SMALL = f"{SOUND},kv-tokens=600,step-tokens-max=16,sequences-max=4"
SERVE = (
    *("--group", f"{SOUND},name=first", "--step-deadline", "2", "--attempts-max", "1000"),
    *("--graceful-termination-timeout", "20"),
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
REFUSED = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND)
FAULT = re.compile(r"Traceback|never retrieved|never awaited|was destroyed|ERROR|CRITICAL")

Ask = Callable[[Server, grpc.Channel], object]
"""Asks a server, over REST or gRPC; what it returns is all of the answer."""


def native(prompt: str, tokens: int, **parameters: Any) -> Ask:
    """A stream of ``/generate_stream``, which is to end once, and not in an error."""
    given = {"max_new_tokens": tokens, "details": True, **parameters}

    def ask(server: Server, _: grpc.Channel) -> object:
        body = {"inputs": prompt, "parameters": given}
        with server.client.stream("POST", "/generate_stream", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            events = [json.loads(line[5:]) for line in filter(None, answer.iter_lines())]
        assert [event for event in events if event.get("details")] == events[-1:], events[-1:]
        return events

    return ask


def inference(prompt: str, tokens: int, **parameters: Any) -> Ask:
    """A stream of ``Inference.Generate``, whose messages may be cut otherwise another time."""
    wanted = router_pb2.Parameters(max_tokens=tokens, **parameters)

    def ask(_: Server, channel: grpc.Channel) -> object:
        request = router_pb2.GenerateRequest(text=prompt, parameters=wanted)
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
        whole = [router_pb2.GenerateResponse() for _ in range(max(1, wanted.n))]
        for message in stub.Generate(request, timeout=PATIENCE_S):
            answer = whole[message.choice]
            assert not answer.HasField("finish")
            answer.text += message.text
            answer.token_ids.extend(message.token_ids)
            answer.logprobs.extend(message.logprobs)
            answer.top_logprobs.extend(message.top_logprobs)
            if message.HasField("finish"):
                answer.finish.CopyFrom(message.finish)
                answer.finish.cached_tokens = 0  # not of the answer
        assert all(answer.HasField("finish") for answer in whole)
        return whole

    return ask


ASKS = (
    native("Begin and go on", 150),
    native("Begin anew", 120, do_sample=True, temperature=1.2, seed=7),
    native("Begin with other words", 120, repetition_penalty=1.3),
    native("Begin with a list", 120, grammar={"type": "json", "value": SCHEMA}),
    native("Begin with choices", 100, top_n_tokens=3),
    native("Begin and stop", 200, stop=[" people", " water"]),
    inference("Begin in many ways", 80, n=2, seed=3, temperature=0.9, logprobs=True),
    inference("Begin again " * 40, 60, temperature=0.0, prompt_logprobs=True, top_logprobs=2),
    inference("Begin", 120, temperature=0.8, seed=9, presence_penalty=1.0, min_tokens=60),
)


class Load:
    """Streams that follow each other over several faces, until they are told to stop."""

    def __init__(self, servers: list[Server], channel: grpc.Channel) -> None:
        self.checked = 0
        self._servers, self._channel = servers, channel
        self._stop = threading.Event()
        with ThreadPoolExecutor(len(ASKS)) as pool:
            self._expected = list(pool.map(lambda ask: ask(servers[0], channel), ASKS))

    def stream(self, number: int) -> None:
        """One after the other; each answer is what it was when nothing had happened."""
        random = Random(number)
        while not self._stop.is_set():
            place = random.randrange(len(ASKS))
            answer = ASKS[place](random.choice(self._servers), self._channel)
            assert answer == self._expected[place]
            self.checked += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Asks while inside; at the end, all answers were right."""
        with ThreadPoolExecutor(STREAMS) as pool:
            streams: list[Future[None]] = [pool.submit(self.stream, n) for n in range(STREAMS)]
            try:
                yield
            finally:
                self._stop.set()
            for stream in streams:
                stream.result(2 * PATIENCE_S)

    def goes_on(self) -> None:
        """Waits until a few streams have ended that may have met what was done last."""
        due = self.checked + STREAMS // 3
        eventually(lambda: self.checked >= due, PATIENCE_S)


class Operator:
    """Who looks after the server in the night. Each method does one thing to its groups."""

    def __init__(self, server: Server, stub: GroupsStub, random: Random) -> None:
        self.server, self.random = server, random
        self._stub = stub

    def is_free(self) -> bool:
        """Whether no change is under way: one that was taken back may take a while to end."""
        try:
            list(self._stub.RemoveGroup(groups_pb2.RemoveGroupRequest(name="nobody")))
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.NOT_FOUND
        raise AssertionError("a group that is not there was removed")

    def names(self) -> list[str]:
        answer = self._stub.ListGroups(groups_pb2.ListGroupsRequest(), timeout=PATIENCE_S)
        return [group.name for group in answer.groups]

    def switch(self) -> None:
        assert self._done(self._switching(SOUND))

    def stop_first(self) -> None:
        assert self._done(self._switching(SOUND, stop_first=True))

    def switch_to_a_faulty_one(self) -> None:
        assert not self._done(self._switching(FAULTY, stop_first=self.random.random() < 0.5))

    def add_a_small_one(self) -> None:
        assert self._done(self._adding(SMALL))

    def add_one_that_crashes(self) -> None:
        assert self._done(self._adding(CRASHING))

    def add_one_that_wedges(self) -> None:
        assert self._done(self._adding(WEDGING))

    def add_two_at_once(self) -> None:
        calls = [self._adding(SOUND) for _ in range(2)]
        assert sorted(map(self._done, calls)) == [False, True]

    def leave_an_add(self) -> None:
        call = self._adding(SOUND)
        lines = self.random.randrange(1, 4)
        for _ in range(lines):
            next(call, None)
        call.cancel()

    def remove(self) -> None:
        name = self.random.choice(self.names())
        self._done(self._stub.RemoveGroup(groups_pb2.RemoveGroupRequest(name=name)))

    def kill(self) -> None:
        os.kill(self._victim(), signal.SIGKILL)

    def terminate(self) -> None:
        os.kill(self._victim(), signal.SIGTERM)

    def _victim(self) -> int:
        return self.random.choice(sorted(filter(alive, children(self.server.process.pid))))

    def _adding(self, group: str) -> Any:
        return self._stub.AddGroup(groups_pb2.AddGroupRequest(group=group), timeout=PATIENCE_S)

    def _switching(self, group: str, *, stop_first: bool = False) -> Any:
        request = groups_pb2.SwitchGroupsRequest(group=group, stop_first=stop_first)
        return self._stub.SwitchGroups(request, timeout=PATIENCE_S)

    def _done(self, call: Any) -> bool:
        """Whether a change was made. It may be refused, but has to end."""
        try:
            return bool([progress.line for progress in call])
        except grpc.RpcError as error:
            if error.code() not in REFUSED:
                raise
            return False


NIGHT = (
    *(Operator.switch, Operator.stop_first, Operator.switch_to_a_faulty_one),
    *(Operator.add_a_small_one, Operator.remove, Operator.add_one_that_crashes, Operator.remove),
    *(Operator.add_two_at_once, Operator.leave_an_add, Operator.add_one_that_wedges),
    *(Operator.kill, Operator.terminate, Operator.kill, Operator.terminate),
)
"""What happens, in an order that is drawn."""


def idle(server: Server) -> bool:
    """Whether nothing runs, waits, or holds tokens."""
    shown = server.client.get("/metrics").text
    names = ("tgi_queue_size", "tgi_batch_current_size", "tgi_batch_current_max_tokens")
    return all(f"\n{name} 0.0\n" in shown for name in names)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_to_groups_streams_go_on(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("night")  # a path so short that sockets have room there
    monkeypatch.setenv("ROUNDHOUSE_CONTROL", str(tmp_path / "control"))
    random = Random(seed)
    with serving(tmp_path, *SERVE) as server, gateway(tmp_path, server.grpc) as before:
        socket = control_socket(int(server.rest.rpartition(":")[2]))
        with (
            grpc.insecure_channel(f"unix:{socket}") as control,
            grpc.insecure_channel(server.grpc) as channel,
        ):
            stub = GroupsStub(control)  # type: ignore[no-untyped-call]
            operator, load = Operator(server, stub, random), Load([server, before], channel)
            with load.running():
                for happens in random.sample(NIGHT, len(NIGHT)):
                    eventually(operator.is_free)
                    happens(operator)
                    load.goes_on()
            eventually(lambda: idle(server))
            eventually(operator.is_free)
            operator.switch()
            assert len(operator.names()) == 1
        eventually(lambda: len(children(server.process.pid)) == 1)
        assert len(list(tmp_path.glob("roundhouse-*/*.sock"))) == 1
        shown = server.client.get("/metrics").text
        assert not re.search(r"^tgi_request_failure\{.*\} [^0]", shown, re.MULTILINE)
    logs = (tmp_path / "stderr").read_text() + (tmp_path / "gateway").read_text()
    assert not FAULT.search(logs), logs[-4000:]
