"""``inference.GRPCInferenceService``: the Open Inference Protocol, as ``tritonclient`` calls it.

A prompt is an element of the BYTES input ``text_input``, its answer one of ``text_output``.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from router.api.grpc_calls import (
    BOTH_WAYS,
    UNARY,
    Context,
    Handler,
    Received,
    check_key,
    failing_well,
    guarded,
    handler,
    opened,
    time_left_s,
    understood,
)
from router.api.grpc_errors import first_of, known_fault, renaming
from router.api.kserve_answers import Piece, logprob_sum, outputs_of
from router.api.kserve_models import (
    VERSION,
    config_of,
    index_of,
    metadata_of,
    statistics_of,
)
from router.api.kserve_params import WORDS, Wish, field_name, values_of, wish_of
from router.api.kserve_tensors import Tensor, add_outputs, inputs_of
from router.api.rest.collect import collect_all
from router.api.rest.tgi import version
from router.auth import ApiKeys
from router.config import Settings
from router.errors import Fault, RequestError
from router.fleet import Fleet, ModelCard
from router.kserve.v1 import inference_pb2 as pb
from router.metrics_models import Models
from router.service import Service

SERVICE = "inference.GRPCInferenceService"
EXTENSIONS = ("model_configuration", "parameters", "schedule_policy", "statistics")
FINAL = "triton_final_response"

ABSENT = {
    **dict.fromkeys(
        ("RepositoryModelLoad", "RepositoryModelUnload"),
        "models are loaded when their workers start",
    ),
    **dict.fromkeys(
        (
            *("SystemSharedMemoryStatus", "SystemSharedMemoryRegister"),
            *("SystemSharedMemoryUnregister", "CudaSharedMemoryStatus"),
            *("CudaSharedMemoryRegister", "CudaSharedMemoryUnregister"),
        ),
        "tensors travel in the messages",
    ),
    "TraceSetting": "tracing is not set over this protocol",
    "LogSettings": "logging is set when the router starts",
}
"""Methods of Triton that are not offered, and why or what there is instead."""

Send = Callable[[pb.ModelStreamInferResponse], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Job:
    """A request that was understood: its wishes, one for each prompt."""

    request: pb.ModelInferRequest
    card: ModelCard
    prompts: Tensor
    wishes: Sequence[Wish]

    def response(self, pieces: Sequence[Piece]) -> pb.ModelInferResponse:
        """The answer with these pieces, one for each prompt."""
        request = self.request
        response = pb.ModelInferResponse(
            model_name=request.model_name or self.card.id, model_version=VERSION, id=request.id
        )
        outputs = outputs_of(self.wishes[0].outputs, pieces, self.prompts.shape)
        # Who sends typed lists may not know of raw bytes, and the other way round.
        add_outputs(response, outputs, raw=bool(request.raw_input_contents))
        return response


class InferenceService:
    """The methods of the service. ``keys`` guards those that run a model.

    ``models`` has counted the requests of each model.
    """

    def __init__(
        self, service: Service, fleet: Fleet, keys: ApiKeys, settings: Settings, models: Models
    ) -> None:
        self._service = service
        self._models = models
        self._fleet = fleet
        self._keys = keys
        self._settings = settings

    async def server_live(
        self, request: Received[pb.ServerLiveRequest], context: Context
    ) -> pb.ServerLiveResponse:
        """Tells whether the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(
        self, request: Received[pb.ServerReadyRequest], context: Context
    ) -> pb.ServerReadyResponse:
        """Tells whether some model can take requests."""
        return pb.ServerReadyResponse(ready=self._fleet.healthy)

    async def model_ready(
        self, request: Received[pb.ModelReadyRequest], context: Context
    ) -> pb.ModelReadyResponse:
        """Tells whether a model can take requests; one that nobody knows cannot."""
        async with opened(request, context) as known:
            try:
                ready = self._fleet.takes(self._card(known.name, known.version))
            except RequestError:
                ready = False
            return pb.ModelReadyResponse(ready=ready)
        raise AssertionError("either returned or aborted")

    async def server_metadata(
        self, request: Received[pb.ServerMetadataRequest], context: Context
    ) -> pb.ServerMetadataResponse:
        """Tells who answers."""
        return pb.ServerMetadataResponse(
            name="roundhouse", version=version(), extensions=EXTENSIONS
        )

    async def model_metadata(
        self, request: Received[pb.ModelMetadataRequest], context: Context
    ) -> pb.ModelMetadataResponse:
        """Tells the tensors of a model."""
        async with opened(request, context) as known:
            return metadata_of(self._card(known.name, known.version))
        raise AssertionError("either returned or aborted")

    async def model_config(
        self, request: Received[pb.ModelConfigRequest], context: Context
    ) -> pb.ModelConfigResponse:
        """Tells what a model's configuration would be on Triton."""
        async with opened(request, context) as known:
            return config_of(self._card(known.name, known.version))
        raise AssertionError("either returned or aborted")

    async def repository_index(
        self, request: Received[pb.RepositoryIndexRequest], context: Context
    ) -> pb.RepositoryIndexResponse:
        """Lists the models."""
        async with opened(request, context) as known:
            return index_of(self._fleet, known.ready)
        raise AssertionError("either returned or aborted")

    async def model_statistics(
        self, request: Received[pb.ModelStatisticsRequest], context: Context
    ) -> pb.ModelStatisticsResponse:
        """Tells what became of the requests of a model, or of each model if none is named."""
        async with opened(request, context) as known:
            named = known.name or known.version
            cards = [self._card(known.name, known.version)] if named else self._fleet.models()
            return pb.ModelStatisticsResponse(
                model_stats=[statistics_of(card, self._models) for card in cards]
            )
        raise AssertionError("either returned or aborted")

    async def model_infer(
        self, request: Received[pb.ModelInferRequest], context: Context
    ) -> pb.ModelInferResponse:
        """Continues prompts, and answers when all have ended. One failure ends the others."""
        async with guarded(self._keys, request, context, self._service.refused) as known:
            with renaming(field_name, WORDS):
                return await self._once(self._job(known, time_left_s(context)))
        raise AssertionError("either returned or aborted")

    async def model_stream_infer(
        self, requests: AsyncIterator[Received[pb.ModelInferRequest]], context: Context
    ) -> None:
        """Runs every request of a stream as it comes; answers of several may alternate."""
        one_at_a_time = asyncio.Lock()  # grpcio takes one message of a call at once

        async def send(message: pb.ModelStreamInferResponse) -> None:
            async with one_at_a_time:
                await context.write(message)

        # Refusals beyond the limit of open requests are answers, too; they wait to be written.
        room = asyncio.Semaphore(2 * self._settings.max_concurrent_requests)
        async with failing_well(context):
            check_key(self._keys, context)
            async with asyncio.TaskGroup() as group:
                async for request in requests:
                    known = understood(request)
                    await room.acquire()
                    task = group.create_task(self._answer(known, time_left_s(context), send))
                    task.add_done_callback(lambda _: room.release())

    async def _answer(
        self, request: pb.ModelInferRequest, left_s: float | None, send: Send
    ) -> None:
        """Sends everything that one request of a stream gets; a failure is a message there."""
        try:
            with renaming(field_name, WORDS):
                job = self._job(request, left_s)
                if job.wishes[0].stream:
                    await self._pieces(job, send)
                else:
                    await _send(await self._whole(job), True, send)
        except grpc.aio.BaseError:  # nobody is left to send to
            raise
        except Exception as error:  # noqa: BLE001 -- logged, and answered as INTERNAL
            fault = known_fault(error)
            if isinstance(first_of(error), RequestError):
                self._service.refused(fault)
            failed = pb.ModelStreamInferResponse(
                error_message=fault.message,
                infer_response=pb.ModelInferResponse(
                    id=request.id, model_name=request.model_name, model_version=VERSION
                ),
            )
            failed.infer_response.parameters[FINAL].bool_param = True
            await send(failed)

    async def _once(self, job: Job) -> pb.ModelInferResponse:
        if job.wishes[0].stream:
            text = "`stream` needs ModelStreamInfer: ModelInfer has one answer"
            raise RequestError(Fault.VALIDATION, text, "stream")
        return await self._whole(job)

    async def _whole(self, job: Job) -> pb.ModelInferResponse:
        answers = await collect_all(self._service, [wish.ask for wish in job.wishes])
        pieces = []
        for wish, answer in zip(job.wishes, answers, strict=True):
            text = f"{wish.ask.prompt}{answer.finish.text}" if wish.echo else answer.finish.text
            count, total = answer.finish.prompt_tokens, logprob_sum(answer.tokens)
            pieces.append(Piece(text, answer.tokens, answer.finish, count, total))
        return job.response(pieces)

    async def _pieces(self, job: Job, send: Send) -> None:
        """One answer, piece by piece as it comes."""
        wish, total = job.wishes[0], 0.0
        begin = str(wish.ask.prompt) if wish.echo else ""
        async with await self._service.generate(wish.ask) as answer:
            async for chunk in answer:
                total += logprob_sum(chunk.tokens)
                text, begin = begin + chunk.text, ""
                piece = Piece(text, chunk.tokens, chunk.finish, answer.prompt_tokens, total)
                await _send(job.response([piece]), chunk.finish is not None, send)

    def _job(self, request: pb.ModelInferRequest, left_s: float | None) -> Job:
        """Reads a request. Raises RequestError."""
        card = self._card(request.model_name, request.model_version)
        inputs = inputs_of(request)
        prompts = self._prompts(inputs)
        rows = len(prompts.values)
        wishes = [
            wish_of(prompt, values_of(request, inputs, index, rows), request, left_s)
            for index, prompt in enumerate(prompts.values)
        ]
        if rows > 1 and any(wish.stream for wish in wishes):
            text = "a request that streams has one prompt; send the others beside it on the stream"
            raise RequestError(Fault.VALIDATION, text, "text_input")
        return Job(request, card, prompts, wishes)

    def _prompts(self, inputs: Mapping[str, Tensor]) -> Tensor:
        prompts, limit = inputs.get("text_input"), self._settings.max_concurrent_requests
        fault = ""
        if prompts is None or prompts.datatype != "BYTES":
            fault = "the input `text_input`, of the datatype BYTES, is needed: the prompts"
        elif len(prompts.shape) > 2 or prompts.shape[1:] not in ((), (1,)):
            fault = f"the shape of `text_input` must be [n] or [n, 1], not {list(prompts.shape)}"
        elif not 1 <= len(prompts.values) <= limit:
            fault = f"`text_input` can have 1 to {limit} prompts, not {len(prompts.values)}"
        if prompts is None or fault:
            raise RequestError(Fault.VALIDATION, fault, "text_input")
        return prompts

    def _card(self, name: str, wanted: str) -> ModelCard:
        """The model of that name. Raises RequestError, MODEL_NOT_FOUND."""
        card = self._fleet.model(name or None)
        if wanted not in ("", VERSION):
            text = f"model {card.id!r} has no version {wanted[:20]!r}, only {VERSION!r}"
            raise RequestError(Fault.MODEL_NOT_FOUND, text, "model_version")
        return card

    def handlers(self) -> dict[str, Handler]:
        """The methods of the service, and refusals of what Triton has beside them."""
        most = self._settings.payload_limit
        methods: dict[str, Callable[[Any, Context], Any]] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
            "ModelConfig": self.model_config,
            "ModelStatistics": self.model_statistics,
            "RepositoryIndex": self.repository_index,
        }
        found = {
            name: handler(
                UNARY, method, getattr(pb, f"{name}Request"), getattr(pb, f"{name}Response"), most
            )
            for name, method in methods.items()
        }
        found["ModelStreamInfer"] = handler(
            BOTH_WAYS,
            self.model_stream_infer,
            pb.ModelInferRequest,
            pb.ModelStreamInferResponse,
            most,
        )
        return found | {name: UNARY(_refusal(name, why)) for name, why in ABSENT.items()}


async def _send(response: pb.ModelInferResponse, last: bool, send: Send) -> None:
    response.parameters[FINAL].bool_param = last
    await send(pb.ModelStreamInferResponse(infer_response=response))


def _refusal(name: str, why: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def refuse(_: bytes, context: Context) -> bytes:
        async with failing_well(context):
            raise RequestError(Fault.UNSUPPORTED, f"{name} is not offered: {why}")
        raise AssertionError("aborted")

    return refuse
