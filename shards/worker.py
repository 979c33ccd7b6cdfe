"""The servicer of ``shards.v1.Shard``: plans in, outcomes out, one message for each.

The engine lives on a thread of its own (``engine_thread``). Here a Run stream is two coroutines:
one reads plans, checks their count, and queues them; the other writes answers as they come. At most
``PLANS_MAX`` plans wait; a router that sends more is held back by the stream's flow control.
"""

import asyncio
import contextlib
import uuid
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from shards.embed_queue import BusyError
from shards.engine_thread import Answer, Begun, End, Ending, EngineThread, Leaving, Loaded, Session
from shards.engines.base import Engine, EngineLost, FeatureError, PlanError
from shards.grammar import ConstraintError
from shards.grammar_queue import GrammarQueue, TooManyError
from shards.v1 import shard_pb2, shard_pb2_grpc
from shards.wire import (
    embed_batches,
    embed_inputs,
    file_chunks,
    info_to_wire,
    outcome_to_wire,
    plan_from_wire,
    prepared_constraint,
    vectors_to_wire,
)
from tls.identity import Identity
from tls.wire import NO_PROBES, listen

SERVICE = "shards.v1.Shard"
# A plan may admit many long prompts; an outcome may carry many log probabilities.
MESSAGE_MAX_BYTES = 64 << 20
# How long streams may take to hear that the worker stops, and the engine to end its step.
GRACE_S = 3.0

# A step that takes so long is one that hangs: twice what a router grants it by itself.
HANGS_S = 120.0

_CODES = {
    Ending.BAD_LOG: grpc.StatusCode.FAILED_PRECONDITION,
    Ending.BAD_PLAN: grpc.StatusCode.INVALID_ARGUMENT,
    Ending.TAKEN_OVER: grpc.StatusCode.ABORTED,
    Ending.LOST: grpc.StatusCode.INTERNAL,
    Ending.STOPPING: grpc.StatusCode.UNAVAILABLE,
}

_CALL_CODES: dict[type[Exception], grpc.StatusCode] = {
    FeatureError: grpc.StatusCode.UNIMPLEMENTED,
    PlanError: grpc.StatusCode.INVALID_ARGUMENT,
    ConstraintError: grpc.StatusCode.INVALID_ARGUMENT,
    BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TooManyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    EngineLost: grpc.StatusCode.INTERNAL,
}

_Context = grpc.aio.ServicerContext[shard_pb2.Plan, shard_pb2.Outcome]
_Health = health_pb2.HealthCheckResponse


class ShardServicer(shard_pb2_grpc.ShardServicer):
    """Answers for one engine."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine
        self._instance_id = uuid.uuid4().hex
        self._session: Session | None = None
        self._grammars: GrammarQueue | None = None
        self._leaving = False
        self._stopping = asyncio.Event()

    async def Describe(
        self,
        request: shard_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[shard_pb2.DescribeRequest, shard_pb2.DescribeResponse],
    ) -> shard_pb2.DescribeResponse:
        """Waits for the model, as long as the caller's deadline allows."""
        loaded = await self._welcome(context)
        return info_to_wire(loaded.info, loaded.seconds, self._instance_id, loaded.files)

    async def GetTokenizer(
        self,
        request: shard_pb2.GetTokenizerRequest,
        context: grpc.aio.ServicerContext[shard_pb2.GetTokenizerRequest, shard_pb2.TokenizerChunk],
    ) -> AsyncIterator[shard_pb2.TokenizerChunk]:
        """The tokenizer files, one after the other."""
        loaded = await self._welcome(context)
        for chunk in file_chunks(loaded.files):
            yield chunk

    async def Run(
        self,
        request_iterator: AsyncIterator[shard_pb2.Plan],
        context: _Context,
    ) -> None:
        """Serves the log of plans; see the .proto file."""
        loaded = await self._welcome(context)
        session = self._take_over()
        reader = asyncio.create_task(self._read(session, context, loaded), name="plans")
        try:
            end = await self._write(session, context, loaded.info.rank)
        finally:
            session.over = True
            session.closed.set()
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
        if end.why is not Ending.FINISHED:
            await context.abort(_CODES[end.why], end.message)

    async def Embed(
        self,
        request: shard_pb2.EmbedRequest,
        context: grpc.aio.ServicerContext[shard_pb2.EmbedRequest, shard_pb2.EmbedResponse],
    ) -> shard_pb2.EmbedResponse:
        """Embeds batch by batch between the steps; when the call ends, what is left is not done."""
        info = (await self._loaded(context)).info
        vectors: list[Sequence[float]] = []
        try:
            for batch in embed_batches(embed_inputs(request, info), info.embed_tokens_max):
                vectors += await self._engine.embeds.embed(batch)
        except tuple(_CALL_CODES) as error:
            await context.abort(_CALL_CODES[type(error)], str(error))
        return vectors_to_wire(vectors)

    async def Prepare(
        self,
        request: shard_pb2.PrepareRequest,
        context: grpc.aio.ServicerContext[shard_pb2.PrepareRequest, shard_pb2.PrepareResponse],
    ) -> shard_pb2.PrepareResponse:
        """Compiles a constraint beside the steps; see the .proto file."""
        queue = self._compiling(await self._loaded(context))
        try:
            await queue.prepare(prepared_constraint(request))
        except tuple(_CALL_CODES) as error:
            await context.abort(_CALL_CODES[type(error)], str(error))
        return shard_pb2.PrepareResponse()

    def _compiling(self, loaded: Loaded) -> GrammarQueue:
        if self._grammars is None:
            self._grammars = GrammarQueue(loaded.grammar, loaded.info.engine)
        return self._grammars

    @property
    def streams(self) -> bool:
        """Whether a Run stream is open."""
        return self._session is not None and not self._session.closed.is_set()

    async def leave(self) -> None:
        """Turns new callers away, and tells the stream that is open; waits until that is closed.

        One that its engine has yet to be emptied for is told as soon as that is done: what is
        written first says that it is.
        """
        self._leaving = True
        session = self._session
        if session is None:
            return
        if session.begun:
            session.hear(Leaving())
        await session.closed.wait()

    def stop(self) -> None:
        """Tells the stream that is open to end, and all who wait for the model; none may come."""
        self._stopping.set()
        self._end_session(End(Ending.STOPPING, "the worker is stopping"))

    async def _welcome(self, context: grpc.aio.ServicerContext[Any, Any]) -> Loaded:
        """As ``_loaded``, for calls of those who are new here: a worker that leaves takes none."""
        loaded = await self._loaded(context)
        if self._leaving:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is leaving")
        return loaded

    async def _loaded(self, context: grpc.aio.ServicerContext[Any, Any]) -> Loaded:
        """Waits for the model; ends the call if that cannot be had, or not any more."""
        stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
        try:
            await asyncio.wait((self._engine.loaded, stopping), return_when=FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if self._engine.lost.done():
            await context.abort(grpc.StatusCode.INTERNAL, self._engine.lost.result())
        if self._stopping.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is stopping")
        try:
            return self._engine.loaded.result()
        except Exception as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the model is not loaded: {error}")
            raise

    def _take_over(self) -> Session:
        self._end_session(End(Ending.TAKEN_OVER, "another Run stream took over"))
        session = self._session = Session()
        self._engine.begin(session)
        return session

    def _end_session(self, end: End) -> None:
        session = self._session
        if session is not None and not session.over:
            session.over = True
            session.hear(end)

    async def _read(self, session: Session, context: _Context, loaded: Loaded) -> None:
        """Queues plans until the stream ends or one breaks the protocol.

        A plan whose constraints have yet to be compiled waits for that, and so do those behind it.
        """
        last_id, epoch = 0, None
        while True:
            message: object = await context.read()
            if not isinstance(message, shard_pb2.Plan):
                self._engine.finish(session, End(Ending.FINISHED, "the router closed the stream"))
                return
            if epoch is None:
                epoch = session.epoch = message.epoch
            if message.plan_id != last_id + 1 or message.epoch != epoch:
                told = f"plan {message.plan_id} of epoch {message.epoch}"
                due = f"{last_id + 1} of epoch {epoch}"
                self._engine.finish(session, End(Ending.BAD_LOG, f"{told} came where {due} is due"))
                return
            last_id += 1
            try:
                plan = plan_from_wire(message, loaded.info.adapters)
            except PlanError as error:
                bad = End(Ending.BAD_PLAN, f"plan {last_id}: {error}")
                self._engine.finish(session, bad)
                return
            constraints = [admit.sampling.constraint for admit in plan.admits]
            if any(constraints):
                await self._compiling(loaded).prepare_all(filter(None, constraints))
            await session.room.acquire()
            self._engine.step(session, epoch, last_id, plan)

    async def _write(self, session: Session, context: _Context, rank: int) -> End:
        """Writes answers in order until the session ends. Initial metadata says: it has begun."""
        while True:
            await session.wake.wait()
            session.wake.clear()
            while session.answers:
                match session.answers.popleft():
                    case Begun():
                        await context.send_initial_metadata(())
                        session.begun = True
                        if self._leaving:
                            session.hear(Leaving())
                    case Leaving():
                        await context.write(shard_pb2.Outcome(epoch=session.epoch, leaving=True))
                    case End() as end:
                        return end
                    case Answer() as answer:
                        digest = session.digest.add(answer.plan, answer.outcome)
                        await context.write(_message(answer, digest, rank))
                        session.room.release()


class _Probed(HealthServicer):  # type: ignore[misc]  # the package has no types
    """Health that is asked for says, too, whether the engine hangs, which no event would tell."""

    def __init__(self, engine: EngineThread) -> None:
        super().__init__()
        self._engine = engine

    async def Check(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> health_pb2.HealthCheckResponse:
        """The status of a service."""
        if self._engine.busy_s() > HANGS_S:
            return _Health(status=_Health.NOT_SERVING)
        answer: health_pb2.HealthCheckResponse = await super().Check(request, context)
        return answer


def _message(said: Answer, digest: int, rank: int) -> shard_pb2.Outcome:
    return outcome_to_wire(said.epoch, said.plan_id, said.outcome, digest, said.step_us, rank)


class Worker:
    """One engine behind one gRPC server.

    ``overrides`` gives tokenizer files that take the place of the model's own. ``cluster`` is by
    what it and routers know each other over TCP; None: nothing is encrypted.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        address: str,
        overrides: Callable[[], dict[str, bytes]] = dict,
        cluster: Identity | None = None,
    ) -> None:
        self._engine = EngineThread(make, asyncio.get_running_loop(), overrides)
        self._servicer = ShardServicer(self._engine)
        self._health = _Probed(self._engine)
        self.address = address
        self._cluster = cluster
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
                ("grpc.max_send_message_length", MESSAGE_MAX_BYTES),
                # Two workers on one port would each get some of the calls.
                ("grpc.so_reuseport", 0),
                *NO_PROBES,
                # The router pings an idle stream to learn whether this host is still there.
                ("grpc.http2.max_ping_strikes", 0),
            )
        )

    async def start(self) -> None:
        """Listens, then begins to load. Raises ``OSError`` with one line if it cannot listen."""
        shard_pb2_grpc.add_ShardServicer_to_server(  # type: ignore[no-untyped-call]
            self._servicer, self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._server)
        await self._tell_health(_Health.NOT_SERVING)
        try:
            port = listen(self._server, self.address, self._cluster)
        except RuntimeError as error:
            hint = "is the address free, and does its folder exist?"
            raise OSError(f"cannot listen on {self.address}: {hint}") from error
        if self.address.endswith(":0"):
            self.address = f"{self.address[:-2]}:{port}"
        await self._server.start()
        self._engine.start()

    async def ready(self) -> Loaded:
        """Waits until the model is loaded, and serves. Raises what loading raised."""
        loaded = await asyncio.shield(self._engine.loaded)
        await self._tell_health(_Health.SERVING)
        return loaded

    async def lost(self) -> str:
        """Waits until the engine is lost; returns why, in one line. The streams have heard it."""
        reason = await asyncio.shield(self._engine.lost)
        await self._tell_health(_Health.NOT_SERVING)
        return reason

    @property
    def loading(self) -> bool:
        """Whether the model is not there yet, and has not failed to be."""
        return not self._engine.loaded.done()

    @property
    def streams(self) -> bool:
        """Whether a router has a stream of plans open here."""
        return self._servicer.streams

    async def leave(self) -> None:
        """Takes nobody new, and waits until the router has closed its stream, if there is one.

        Plans are answered until then. The caller sets the limit, and calls ``stop`` afterwards.
        """
        await self._tell_health(_Health.NOT_SERVING)
        await self._servicer.leave()

    async def stop(self) -> bool:
        """Ends all streams and closes the engine; says whether the engine let go in time."""
        await self._tell_health(_Health.NOT_SERVING)
        self._servicer.stop()
        await self._server.stop(GRACE_S)
        return await asyncio.to_thread(self._engine.stop, GRACE_S)

    async def _tell_health(self, status: int) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)
