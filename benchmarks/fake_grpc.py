"""A gRPC server of canned answers, to measure the gRPC load generator: see ``benchmarks.fake``."""

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc

from benchmarks.fake import PACE_S
from router.v1 import router_pb2, router_pb2_grpc

Context = grpc.aio.ServicerContext[router_pb2.GenerateRequest, router_pb2.GenerateResponse]


class Canned(router_pb2_grpc.InferenceServicer):
    """Answers Generate with as many tokens as were asked for."""

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        """One message for each token; the last one has finish."""
        tokens = request.parameters.max_tokens
        for index in range(tokens - 1):
            yield router_pb2.GenerateResponse(token_ids=[index], text=" word")
            await asyncio.sleep(PACE_S)
        finish = router_pb2.Finish(generated_tokens=tokens)
        yield router_pb2.GenerateResponse(token_ids=[0], text=" end", finish=finish)


async def start(port: int) -> tuple[grpc.aio.Server, int]:
    """Starts the server; returns it and its port."""
    server = grpc.aio.server()
    router_pb2_grpc.add_InferenceServicer_to_server(Canned(), server)  # type: ignore[no-untyped-call]
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, bound


async def serve(port: int) -> None:
    """Serves until the process is ended."""
    server, _ = await start(port)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
