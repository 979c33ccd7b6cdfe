"""``router.v1.Inference`` over gRPC, with health and reflection."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, TypeVar

import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from router.api import grpc_convert as convert
from router.api.grpc_errors import abort
from router.ask import Ask, TokenOut
from router.auth import ApiKeys
from router.config import Settings
from router.errors import Fault, RequestError
from router.fleet import Fleet
from router.service import Service
from router.v1 import router_pb2 as pb

SERVICE = "router.v1.Inference"
HEALTH = "grpc.health.v1.Health"
HEALTH_POLL_S = 1.0
UNARY = grpc.unary_unary_rpc_method_handler
STREAM = grpc.unary_stream_rpc_method_handler

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
M = TypeVar("M", bound=Message)


class Inference:
    """The methods of the service; each translates, asks the service and translates back."""

    def __init__(self, service: Service, fleet: Fleet, keys: ApiKeys) -> None:
        self._service = service
        self._fleet = fleet
        self._keys = keys

    async def generate(self, request: pb.GenerateRequest | None, context: Context) -> None:
        """Continues a prompt."""
        async with self._call(request, context) as known:
            ask = convert.generate_ask(known, time_left_s(context))
            await self._run(ask, known.parameters, context)

    async def chat(self, request: pb.ChatRequest | None, context: Context) -> None:
        """Answers a conversation."""
        async with self._call(request, context) as known:
            model = self._fleet.model(known.model or None)
            messages = convert.chat_messages(known)
            prompt = await self._service.render_chat(model, messages, add_generation_prompt=True)
            ask = convert.chat_ask(known, prompt, time_left_s(context))
            await self._run(ask, known.parameters, context)

    async def embed(self, request: pb.EmbedRequest | None, context: Context) -> pb.EmbedResponse:
        """Turns inputs into vectors."""
        async with self._call(request, context) as known:
            ask = convert.embed_ask(known, time_left_s(context))
            return convert.embeddings_of(await self._service.embed(ask))
        raise AssertionError("either returned or aborted")

    async def tokenize(
        self, request: pb.TokenizeRequest | None, context: Context
    ) -> pb.TokenizeResponse:
        """Turns text into token ids."""
        async with self._call(request, context) as known:
            found = await self._service.tokenize(
                known.model or None, known.text, known.add_special_tokens
            )
            return convert.tokens_of(found)
        raise AssertionError("either returned or aborted")

    async def detokenize(
        self, request: pb.DetokenizeRequest | None, context: Context
    ) -> pb.DetokenizeResponse:
        """Turns token ids into text."""
        async with self._call(request, context) as known:
            text = await self._service.detokenize(
                known.model or None, known.token_ids, known.skip_special_tokens
            )
            return pb.DetokenizeResponse(text=text)
        raise AssertionError("either returned or aborted")

    async def list_models(
        self, request: pb.ListModelsRequest | None, context: Context
    ) -> pb.ListModelsResponse:
        """Lists the models of the fleet; needs no key, as on REST."""
        models = [convert.model_of(card) for card in self._fleet.models()]
        return pb.ListModelsResponse(models=models)

    @asynccontextmanager
    async def _call(self, request: M | None, context: Context) -> AsyncIterator[M]:
        """Checks key and request; whatever goes wrong inside becomes the status of the call."""
        try:
            self._keys.check(dict(context.invocation_metadata() or ()).get("authorization"))
            yield _understood(request)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001 -- logged, and answered as INTERNAL
            await abort(context, error)

    async def _run(self, ask: Ask, params: pb.Parameters, context: Context) -> None:
        """Writes an answer, in messages of at least ``stream_tokens`` tokens but for the last.

        A chunk holds all that came while the last message was being written, so messages grow by
        themselves when the process is busy.
        """
        least = params.stream_tokens
        tokens: list[TokenOut] = []
        text = ""
        async with await self._service.generate(ask) as answer:
            try:
                async for chunk in answer:
                    tokens += chunk.tokens
                    text += chunk.text
                    if len(tokens) < least and chunk.finish is None:
                        continue
                    await context.write(convert.message_of(tokens, text, chunk.finish, params))
                    tokens, text = [], ""
                    if chunk.finish is not None:
                        return
            except RequestError:
                if tokens:
                    await context.write(convert.message_of(tokens, text, None, params))
                raise


def _understood(request: M | None) -> M:
    if request is None:
        raise RequestError(Fault.VALIDATION, "the request is not a message of this method")
    return request


def time_left_s(context: Context) -> float | None:
    """Returns what is left of the client's deadline, in seconds, or None if it set none."""
    left = context.time_remaining()
    return None if left is None or left == float("inf") else max(left, 0.001)


class Health:
    """``grpc.health.v1``: SERVING while some model can take requests. Load plays no part.

    The state is read from the fleet when somebody asks, so that there is none to keep up to date;
    a Watch looks once a second.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def _status(self, service: str) -> health_pb2.HealthCheckResponse:
        states = health_pb2.HealthCheckResponse.ServingStatus
        if service not in ("", SERVICE):
            return health_pb2.HealthCheckResponse(status=states.SERVICE_UNKNOWN)
        up = any(self._fleet.groups_up().values())
        status = states.SERVING if up else states.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=status)

    async def check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Says how it is now."""
        found = self._status(request.service)
        if found.status == health_pb2.HealthCheckResponse.ServingStatus.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:100]!r}")
        return found

    async def watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Says how it is now and at every change, until the client leaves."""
        last = None
        while True:
            found = self._status(request.service)
            if found != last:
                await context.write(found)
                last = found
            await asyncio.sleep(HEALTH_POLL_S)


def _handler(
    make: Callable[..., Handler],
    method: Callable[[Any, Context], Awaitable[Any]],
    request: type[Message],
    response: type[Message],
) -> Handler:
    """Returns a method as the generated code would, but for the forgiving parser."""
    return make(
        method,
        request_deserializer=convert.decoder(request),
        response_serializer=response.SerializeToString,
    )


def _inference_handlers(inference: Inference) -> dict[str, Handler]:
    return {
        "Generate": _handler(STREAM, inference.generate, pb.GenerateRequest, pb.GenerateResponse),
        "Chat": _handler(STREAM, inference.chat, pb.ChatRequest, pb.GenerateResponse),
        "Embed": _handler(UNARY, inference.embed, pb.EmbedRequest, pb.EmbedResponse),
        "Tokenize": _handler(UNARY, inference.tokenize, pb.TokenizeRequest, pb.TokenizeResponse),
        "Detokenize": _handler(
            UNARY, inference.detokenize, pb.DetokenizeRequest, pb.DetokenizeResponse
        ),
        "ListModels": _handler(
            UNARY, inference.list_models, pb.ListModelsRequest, pb.ListModelsResponse
        ),
    }


def _health_handlers(health: Health) -> dict[str, Handler]:
    request, response = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    return {
        "Check": _handler(UNARY, health.check, request, response),
        "Watch": _handler(STREAM, health.watch, request, response),
    }


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.payload_limit),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),  # a second router on the port is an error, not a lottery
        # Finds clients that vanished without closing, and lets idle ones ping as often as 10 s.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]


async def start(service: Service, fleet: Fleet, settings: Settings) -> grpc.aio.Server:
    """Starts serving on ``settings.host`` and ``grpc_port``; the caller stops it.

    Raises OSError, with one line, if the port cannot be had.
    """
    server = grpc.aio.server(options=_options(settings))
    inference = Inference(service, fleet, ApiKeys(settings.api_key))
    handlers = (
        grpc.method_handlers_generic_handler(SERVICE, _inference_handlers(inference)),
        grpc.method_handlers_generic_handler(HEALTH, _health_handlers(Health(fleet))),
    )
    server.add_generic_rpc_handlers(handlers)
    reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), server)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: the port is in use, or not allowed") from error
    if bound == 0:
        raise OSError(f"cannot listen on {address}")
    await server.start()
    return server
