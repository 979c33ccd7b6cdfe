"""A chat template of the operator's own, in place of all that a model has."""

from pathlib import Path

import grpc.aio

from shards.engines.base import EngineOptions
from shards.engines.scripted import ScriptedEngine
from shards.v1 import shard_pb2 as pb
from shards.v1 import shard_pb2_grpc
from shards.worker import Worker


class Templates(ScriptedEngine):
    """Has a template for tools, too."""

    def tokenizer_files(self) -> dict[str, bytes]:
        return super().tokenizer_files() | {"additional_chat_templates/tool_use.jinja": b"t"}


async def names(address: str, overrides: dict[str, bytes]) -> dict[str, bytes]:
    """The files that a worker sends."""
    options = EngineOptions(None, "m")
    worker = Worker(
        lambda: Templates(options, lambda _: None), address, overrides=lambda: overrides
    )
    await worker.start()
    try:
        await worker.ready()
        async with grpc.aio.insecure_channel(worker.address) as channel:
            stub = shard_pb2_grpc.ShardStub(channel)
            files: dict[str, bytes] = {}
            async for chunk in stub.GetTokenizer(pb.GetTokenizerRequest()):
                files[chunk.name] = files.get(chunk.name, b"") + chunk.data
    finally:
        await worker.stop()
    return files


async def test_an_operators_template_is_the_only_one(tmp_path: Path) -> None:
    files = await names(f"unix://{tmp_path}/a.sock", {})
    assert files["additional_chat_templates/tool_use.jinja"] == b"t"
    mine = {"chat_template.jinja": b"mine"}
    files = await names(f"unix://{tmp_path}/b.sock", mine)
    assert files["chat_template.jinja"] == b"mine"
    assert "additional_chat_templates/tool_use.jinja" not in files
    assert "tokenizer.json" in files
