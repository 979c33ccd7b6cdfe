"""The examples of docs/grpc.md, and those of grpcurl elsewhere, do what they say."""

import asyncio
import re
import shlex
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool, json_format, message_factory

from tests.service.fake_service import FakeService
from tests.service.grpc_rig import address_of, channel_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "grpc.md").read_text()
EXAMPLES = [
    code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "triton" not in code
]
# One command a match, with the lines that it goes on in.
COMMANDS = [
    shlex.split(command.replace("\\\n", ""))[1:]
    for command in re.findall(
        r"^(?:\$ )?(grpcurl (?:.*\\\n)*.*)$", PAGE + (ROOT / "README.md").read_text(), re.MULTILINE
    )
]
CALLS = [words for words in COMMANDS if "-d" in words]
ASKS = [words for words in COMMANDS if "-d" not in words]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3
    assert len(CALLS) == 4
    assert len(ASKS) == 3


@pytest.mark.parametrize("code", EXAMPLES, ids=["generate", "chat", "tgis"])
async def test_an_example_runs(code: str) -> None:
    """In a process of its own, as its reader's."""
    async with address_of(FakeService()) as address, asyncio.timeout(60):
        assert code.count("localhost:50051") == 1
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            code.replace("localhost:50051", address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        shown, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        assert shown.decode().startswith("Once upon a tîme 🙂")


@pytest.mark.parametrize("words", CALLS, ids=lambda words: words[-1])
async def test_a_call_by_grpcurl_is_answered(words: list[str]) -> None:
    """As grpcurl does it: JSON by the names of the messages, and the method by its path."""
    plain, flag, body, address, path = words
    assert (plain, flag, address) == ("-plaintext", "-d", "localhost:50051")
    service, _, name = path.partition("/")
    method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
    request = json_format.Parse(body, message_factory.GetMessageClass(method.input_type)())
    answer = message_factory.GetMessageClass(method.output_type)
    async with channel_of(FakeService()) as channel, asyncio.timeout(60):
        make = channel.unary_stream if method.server_streaming else channel.unary_unary
        call = make(
            f"/{path}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )(request)
        answers = [one async for one in call] if method.server_streaming else [await call]
    assert all(one.ByteSize() for one in answers)
    assert answers


@pytest.mark.parametrize("words", ASKS, ids=" ".join)
def test_what_grpcurl_may_describe_is_there(words: list[str]) -> None:
    plain, address, verb, *names = words
    assert (plain, address) == ("-plaintext", "localhost:50051")
    assert (verb, len(names)) in (("list", 0), ("describe", 1))
    for name in names:
        assert descriptor_pool.Default().FindFileContainingSymbol(name).package == "router.v1"
