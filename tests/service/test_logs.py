"""Log lines: what they look like, and that nobody has to wait for whoever reads them."""

import json
import logging
import os
import threading
import time

import pytest

from router import logs
from router.logs import Aside, formatter
from tests.service.fakes import PATIENCE_S


class Pipe:
    """A pipe that nobody reads yet, and a logger that writes to it on a thread."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self.handler = Aside(self._writing)
        self.handler.setFormatter(formatter(as_json=True))

    def say(self, text: str) -> None:
        self.handler.handle(logging.makeLogRecord({"msg": text}))

    def read(self) -> None:
        """Begins to read."""
        self._reader.start()

    def end(self) -> list[str]:
        """Ends the writing; returns all that was said."""
        self.handler.close()
        self.handler._thread.join(PATIENCE_S)
        os.close(self._writing)
        self._reader.join(PATIENCE_S)
        os.close(self._reading)
        return [json.loads(line)["message"] for line in b"".join(self._parts).splitlines()]

    def _read(self) -> None:
        while part := os.read(self._reading, 1 << 16):
            self._parts.append(part)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Pipe:
    monkeypatch.setattr(logs, "LINES_MAX", 5)
    return Pipe()


def test_lines_come_in_order_and_the_last_ones_too(pipe: Pipe) -> None:
    pipe.read()
    for number in range(4):
        pipe.say(f"line {number}")
    assert pipe.end() == [f"line {number}" for number in range(4)]


def test_a_reader_that_does_not_read_holds_up_nobody_and_hears_of_the_gap(pipe: Pipe) -> None:
    pipe.say("x" * 1_000_000)  # more than any pipe takes
    for number in range(100):
        pipe.say(f"line {number}")  # would never return
    pipe.read()
    deadline = time.monotonic() + PATIENCE_S
    while not pipe.handler._lines.empty():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    pipe.say("later")
    _, *heard, last = pipe.end()
    said = [text for text in heard if text.startswith("line ")]
    gaps = [text.split(" ", 1) for text in heard if text not in said]
    assert {text for _, text in gaps} == {"lines were left out: nobody read them in time"}
    assert len(said) < 10
    assert len(said) + sum(int(left) for left, _ in gaps) == 100, "every line is heard or counted"
    assert last == "later"


def test_what_is_no_unicode_is_written_all_the_same(pipe: Pipe) -> None:
    pipe.read()
    pipe.say("\ud800")
    assert len(pipe.end()) == 1


def test_fields_are_pairs_in_plain_lines_and_an_object_in_json() -> None:
    fields = {"a": 1, "b": "c"}
    record = logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": "m", "fields": fields})
    assert formatter(as_json=False).format(record).endswith("INFO n: m a=1 b=c")
    line = json.loads(formatter(as_json=True).format(record))
    assert (line["message"], line["fields"]) == ("m", fields)
