"""An engine is called by its own thread alone, from the first call to the last."""

import threading
from pathlib import Path

import grpc.aio

from shards.engines.base import EngineOptions
from shards.v1 import shard_pb2 as pb
from tests.engines.bench import first_plan, next_plan, serving
from tests.engines.skilled import SkilledEngine

SKILLED = EngineOptions(None, "m", 4096, 8, 256, adapters=(("prose", Path("p")),))
CONSTRAINT = pb.Constraint(regex="[ab]+")


class Watched(SkilledEngine):
    """Notes from which threads its methods are asked for."""

    def __init__(self) -> None:
        self.touched: dict[str, set[str]] = {}
        super().__init__(SKILLED)

    def __getattribute__(self, name: str) -> object:
        if not name.startswith("_") and name != "touched":
            self.touched.setdefault(name, set()).add(threading.current_thread().name)
        return super().__getattribute__(name)


async def test_every_call_is_made_by_the_engines_thread(tmp_path: Path) -> None:
    made: list[Watched] = []

    def make() -> Watched:
        made.append(Watched())
        return made[0]

    async with serving(tmp_path, make) as client:
        await client.stub.Describe(pb.DescribeRequest())
        assert [chunk async for chunk in client.stub.GetTokenizer(pb.GetTokenizerRequest())]
        await client.stub.Prepare(pb.PrepareRequest(constraint=CONSTRAINT))
        stream = client.stub.Run()
        await stream.write(first_plan(1, 2, sampling=pb.Sampling(constraint=CONSTRAINT)))
        await client.stub.Embed(pb.EmbedRequest(inputs=[pb.EmbedInput(tokens=[1, 2])]))
        await stream.write(next_plan(2, 1))
        assert [(await stream.read()).plan_id for _ in range(2)] == [1, 2]
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
    (engine,) = made
    calls = {"describe", "tokenizer_files", "guide_with", "reset", "start", "embed", "close"}
    assert calls <= engine.touched.keys()
    assert set.union(*engine.touched.values()) == {"engine"}
