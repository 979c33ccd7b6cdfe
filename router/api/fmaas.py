"""``fmaas.GenerationService``: what clients of IBM's text-generation-inference call."""

from functools import partial

from router.api import fmaas_convert as convert
from router.api.fmaas_convert import Answer, Order
from router.api.grpc_calls import (
    STREAM,
    UNARY,
    Context,
    Handler,
    Received,
    guarded,
    handler,
    opened,
    time_left_s,
)
from router.api.grpc_errors import renaming
from router.api.rest.collect import each
from router.auth import ApiKeys
from router.config import Settings
from router.errors import Fault, RequestError
from router.fleet import Fleet, ModelCard
from router.fmaas.v1 import generation_pb2 as pb
from router.generation import Generation
from router.service import Service

SERVICE = "fmaas.GenerationService"


class GenerationService:
    """The methods of the service. ``keys`` guards those that run a model or tokenise."""

    def __init__(self, service: Service, fleet: Fleet, keys: ApiKeys, settings: Settings) -> None:
        self._service = service
        self._fleet = fleet
        self._keys = keys
        self._settings = settings

    async def generate(
        self, request: Received[pb.BatchedGenerationRequest], context: Context
    ) -> pb.BatchedGenerationResponse:
        """Continues prompts, all at once. One failure ends the others.

        All are submitted before any is read: what is wrong with all of them is so refused once.
        """
        async with guarded(self._keys, request, context, self._service.refused) as known:
            self._check_count(len(known.requests))
            left_s = time_left_s(context)
            singles = [
                pb.SingleGenerationRequest(
                    model_id=known.model_id,
                    prefix_id=known.prefix_id,
                    adapter_id=known.adapter_id,
                    request=one,
                    params=known.params,
                )
                for one in known.requests
            ]
            with renaming(convert.field_name, convert.WORDS):
                orders = [await self._order(one, left_s) for one in singles]
                starts = [partial(self._service.generate, order.ask) for order in orders]
                reads = [partial(_read, order) for order in orders]
                responses = await each(starts, reads)
            return pb.BatchedGenerationResponse(responses=responses)
        raise AssertionError("either returned or aborted")

    async def generate_stream(
        self, request: Received[pb.SingleGenerationRequest], context: Context
    ) -> None:
        """Continues a prompt."""
        async with guarded(self._keys, request, context, self._service.refused) as known:
            with renaming(convert.field_name, convert.WORDS):
                order = await self._order(known, time_left_s(context))
                out = Answer(order)
                async with await self._service.generate(order.ask) as answer:
                    if not order.scored:
                        await context.write(out.message())
                    try:
                        async for chunk in answer:
                            out.gather(chunk)
                            await context.write(out.message(answer.prompt))
                    except RequestError as error:
                        out.expire(error)
                        await context.write(out.message(answer.prompt))

    async def tokenize(
        self, request: Received[pb.BatchedTokenizeRequest], context: Context
    ) -> pb.BatchedTokenizeResponse:
        """Turns texts into tokens."""
        async with guarded(self._keys, request, context) as known:
            convert.check_prefix(known.prefix_id)
            self._check_count(len(known.requests))
            card = self._card(known.model_id)
            with renaming(convert.field_name, convert.WORDS):
                found = [await self._tokens(one.text, card, known) for one in known.requests]
            return pb.BatchedTokenizeResponse(responses=found)
        raise AssertionError("either returned or aborted")

    async def model_info(
        self, request: Received[pb.ModelInfoRequest], context: Context
    ) -> pb.ModelInfoResponse:
        """Tells the limits of a model; needs no key, as elsewhere."""
        async with opened(request, context) as known:
            card = self._card(known.model_id)
            return pb.ModelInfoResponse(
                model_kind=pb.ModelInfoResponse.DECODER_ONLY,
                max_sequence_length=card.max_total_tokens,
                max_new_tokens=card.max_total_tokens - 1,
            )
        raise AssertionError("either returned or aborted")

    def _check_count(self, count: int) -> None:
        limit = self._settings.max_concurrent_requests
        if not 1 <= count <= limit:
            text = f"a call can have 1 to {limit} requests. Given: {count}"
            raise RequestError(Fault.VALIDATION, text, "requests")

    def _card(self, name: str) -> ModelCard:
        """The model of that name; the only one there is goes by any name, as it does for TGIS.

        There the name tells servers apart, and clients put in whatever their deployment is called.
        """
        with renaming(convert.field_name, convert.WORDS):
            try:
                return self._fleet.model(name or None)
            except RequestError as error:
                if error.fault is not Fault.MODEL_NOT_FOUND or len(self._fleet.models()) > 1:
                    raise
                return self._fleet.model(None)

    async def _order(self, request: pb.SingleGenerationRequest, left_s: float | None) -> Order:
        convert.check_prefix(request.prefix_id)
        card = self._card(request.model_id)
        spans = await self._service.tokenize(card, request.request.text)
        named = self._fleet.adapter(request.model_id)
        if named and not request.adapter_id:
            request.adapter_id = named
        return convert.order_of(request, card, [id_ for id_, _, _, _ in spans], left_s)

    async def _tokens(
        self, text: str, card: ModelCard, request: pb.BatchedTokenizeRequest
    ) -> pb.TokenizeResponse:
        spans = await self._service.tokenize(card, text)
        if request.truncate_input_tokens:
            spans = spans[-request.truncate_input_tokens :]
        response = pb.TokenizeResponse(token_count=len(spans))
        if request.return_tokens:
            response.tokens.extend(card.tokenizer.piece(id_) for id_, _, _, _ in spans)
        if request.return_offsets:
            for _, _, start, end in spans:
                response.offsets.add(start=start, end=end)
        return response

    def handlers(self) -> dict[str, Handler]:
        """The methods of the service."""
        most = self._settings.payload_limit
        return {
            "Generate": handler(
                UNARY,
                self.generate,
                pb.BatchedGenerationRequest,
                pb.BatchedGenerationResponse,
                most,
            ),
            "GenerateStream": handler(
                STREAM,
                self.generate_stream,
                pb.SingleGenerationRequest,
                pb.GenerationResponse,
                most,
            ),
            "Tokenize": handler(
                UNARY, self.tokenize, pb.BatchedTokenizeRequest, pb.BatchedTokenizeResponse, most
            ),
            "ModelInfo": handler(
                UNARY, self.model_info, pb.ModelInfoRequest, pb.ModelInfoResponse, most
            ),
        }


async def _read(order: Order, answer: Generation) -> pb.GenerationResponse:
    """One answer, complete or as far as its time limit let it come."""
    out = Answer(order)
    try:
        async for chunk in answer:
            out.gather(chunk)
    except RequestError as error:
        out.expire(error)
    return out.message(answer.prompt)
