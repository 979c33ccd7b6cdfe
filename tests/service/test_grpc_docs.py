"""The examples of docs/grpc.md do what they say."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests.service.fake_service import FakeService
from tests.service.grpc_rig import address_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "grpc.md").read_text()
EXAMPLES = [
    code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "triton" not in code
]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3


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
