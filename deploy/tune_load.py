"""The traffic with which ``roundhouse tune`` measures: streaming clients over REST, in one process.

Each client asks again as soon as it has its answer. It is what users of a busy server do and get:
the time to the first token contains the waiting.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from deploy.tune_search import Numbers, Shape

# Words whose tokens make up the prompts: ordinary text, so that answers are too.
TEXT = (
    "the river runs past the old mill and under the stone bridge where children used to wait for"
    " boats that carried grain, salt and letters from the towns along the coast to the villages in"
    " the hills; every autumn the water rose, and people moved their animals to higher ground"
)
# How long a server that is up may take to accept a connection, and to answer what needs no model.
CONNECT_S = 10.0
ANSWER_S = 60.0
# How many times its length the warm-up may take for each client to have had an answer.
WARM_MAX = 4.0
# Longest line of an answer, in bytes, and what is told of an error at most, in characters.
LIMIT = 1 << 20
MESSAGE_MAX = 200


class LoadError(Exception):
    """The server answered with an error, or not at all. The text is one line."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int


@dataclass(slots=True)
class Tally:
    """What the clients have seen. Only what happens while ``open`` counts."""

    open: bool = False
    events: int = 0
    firsts_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    finished_events: int = 0
    finished_tokens: int = 0
    seen: bool = False
    warm_clients: int = 0
    clients: int = 0
    opened_s: float = 0.0

    def begin(self) -> None:
        """From now on it counts."""
        self.open, self.opened_s = True, time.monotonic()

    def words(self) -> str:
        """How far it is, for people."""
        if not self.open:
            return f"warming up: {self.warm_clients} of {self.clients} clients have had an answer"
        return f"measuring: {self.events / max(0.1, time.monotonic() - self.opened_s):.0f} events/s"

    def arrived(self, events: int, since_s: float, *, first: bool) -> None:
        """Some events came together, ``since_s`` after the request or the last ones."""
        self.seen = self.seen or events > 0
        if self.open and events:
            self.events += events
            (self.firsts_s if first else self.gaps_s).append(since_s)

    def numbers(self, seconds: float) -> Numbers:
        """The sums.

        Tokens without text of their own come in no event: the answers' ends say how many tokens an
        event stands for.
        """
        ratio = self.finished_tokens / self.finished_events if self.finished_events else 1.0
        return Numbers(
            tokens_s=round(self.events * ratio / seconds, 2),
            first_p50_ms=_percentile_ms(self.firsts_s, 0.5),
            gap_p50_ms=_percentile_ms(self.gaps_s, 0.5),
            gap_p99_ms=_percentile_ms(self.gaps_s, 0.99),
            requests=len(self.firsts_s),
            seconds=round(seconds, 1),
        )


def _percentile_ms(values_s: list[float], share: float) -> float:
    """The value that this share of all does not exceed, in milliseconds; 0 if there is none."""
    ordered = sorted(values_s)
    index = min(len(ordered) - 1, int(share * len(ordered)))
    return round(ordered[index] * 1e3, 2) if ordered else 0.0


async def measure(
    address: Address,
    shape: Shape,
    warm_s: float,
    window_s: float,
    *,
    patience_s: float,
    tally: Tally,
) -> Numbers:
    """Warms up, then measures for ``window_s`` seconds, in an empty tally. Raises ``LoadError``.

    The clients' first answers have different lengths, so that afterwards some are at their prompt
    while others are in their answer, as on a real server. The warm-up lasts until each has had one,
    at least ``warm_s`` and at most four times that. Both last in any case until a token has come,
    which may take ``patience_s``.
    """
    pool = await vocabulary(address)
    draw = random.Random(shape.concurrency)  # noqa: S311 - not for secrets
    tally.clients = shape.concurrency
    clients = [
        asyncio.create_task(_client(address, shape, pool, tally, draw.random()), name=f"client {n}")
        for n in range(shape.concurrency)
    ]
    try:
        began = time.monotonic()
        while not _is_warm(tally, lasted_s := time.monotonic() - began, warm_s):
            if not tally.seen and lasted_s > patience_s:
                raise LoadError(f"no token came within {patience_s:.0f} s")
            await _run(clients, min(0.1, warm_s))
        tally.begin()
        await _run(clients, window_s)
        while not tally.events:
            if time.monotonic() - tally.opened_s > patience_s:
                raise LoadError(f"no token came within {patience_s:.0f} s")
            await _run(clients, min(0.1, warm_s))
        tally.open = False
        return tally.numbers(time.monotonic() - tally.opened_s)
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


def _is_warm(tally: Tally, lasted_s: float, warm_s: float) -> bool:
    """Whether the warm-up, which has lasted so long, is over."""
    if tally.warm_clients >= tally.clients:
        return lasted_s >= warm_s
    return tally.seen and lasted_s >= WARM_MAX * warm_s


async def _run(clients: list[asyncio.Task[None]], seconds: float) -> None:
    """Lets the clients go on; they never end by themselves, but for an error."""
    done, _ = await asyncio.wait(clients, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for client in done:
        client.result()


async def vocabulary(address: Address) -> list[int]:
    """The ids of the tokens of some words, in the model's own vocabulary."""
    body = json.dumps({"inputs": TEXT})
    answer = b""
    try:
        async with asyncio.timeout(ANSWER_S):
            answer = b"".join([piece async for piece in post(address, "/tokenize", body)])
        pool = sorted({int(token["id"]) for token in json.loads(answer)})
    except TimeoutError as error:
        raise LoadError(f"the server's /tokenize took over {ANSWER_S:.0f} s") from error
    except (ValueError, TypeError, KeyError) as error:
        raise LoadError(f"the server's /tokenize answered {answer[:100]!r}") from error
    if not pool:
        raise LoadError("the model's tokenizer makes no tokens of English words")
    return pool


async def _client(
    address: Address, shape: Shape, pool: list[int], tally: Tally, phase: float
) -> None:
    """Asks until it is cancelled; its first answer is cut to the share ``phase`` of the others."""
    draw = random.Random(phase)  # noqa: S311 - not for secrets
    first, new_tokens = True, max(1, round(shape.new_tokens * phase))
    while True:
        body: dict[str, Any] = {
            "prompt": draw.choices(pool, k=shape.prompt_tokens),
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        await _answer(address, json.dumps(body), tally)
        tally.warm_clients += first
        first, new_tokens = False, shape.new_tokens


async def _answer(address: Address, body: str, tally: Tally) -> None:
    """Reads one answer to its end."""
    events, last_s, rest, final = 0, time.monotonic(), b"", b""
    async for piece in post(address, "/v1/completions", body):
        *lines, rest = (rest + piece).split(b"\n")
        told = [line for line in lines if line.startswith(b"data: {")]
        texts = sum(b'"choices":[]' not in line for line in told)  # that one is the usage alone
        final = told[-1] if told else final
        now_s = time.monotonic()
        tally.arrived(texts, now_s - last_s, first=events == 0)
        events += texts
        last_s = now_s if texts else last_s
    try:
        end = json.loads(final.removeprefix(b"data: "))
        tally.finished_tokens += int(end["usage"]["completion_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"an answer ended with {final[:200].decode(errors='replace')}") from error
    tally.finished_events += events


async def post(address: Address, path: str, body: str) -> AsyncIterator[bytes]:
    """The body of an answer, piece by piece as it comes. Raises ``LoadError``."""
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(address.host, address.port, limit=LIMIT)
    except (OSError, TimeoutError) as error:
        raise LoadError(f"the server cannot be reached: {error or 'no answer'}") from error
    try:
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: {address.host}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        pieces = _chunks(reader) if "transfer-encoding: chunked" in head else _whole(reader)
        status = head.split(" ", 2)[1]
        if status != "200":
            told = b"".join([piece async for piece in pieces])
            raise LoadError(f"the server answered {status}: {_message(told)}")
        async for piece in pieces:
            yield piece
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        raise LoadError(f"the server broke off an answer: {error}") from error
    finally:
        writer.close()


def _message(body: bytes) -> str:
    """What an answer says went wrong, of its beginning; in OpenAI's or TGI's shape, or in none."""
    try:
        error = json.loads(body)["error"]
        told = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, TypeError, KeyError):
        told = body.decode(errors="replace")
    return told[:MESSAGE_MAX]


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """A body in HTTP's chunks."""
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _whole(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """A body that ends with the connection."""
    yield await reader.read()
