"""Answers as the ``GenerateResponse`` messages that carry them."""

from collections.abc import Iterable, Sequence

from router.ask import Chunk, Finish, TokenOut
from router.conversation import Call, CallDelta, ChatChunk, ChatFinish
from router.core.events import Reason
from router.v1 import router_pb2 as pb

FINISH_REASON = {
    Reason.LENGTH: pb.FINISH_REASON_LENGTH,
    Reason.EOS: pb.FINISH_REASON_EOS_TOKEN,
    Reason.STOP_STRING: pb.FINISH_REASON_STOP_SEQUENCE,
    Reason.STOP_TOKEN: pb.FINISH_REASON_STOP_SEQUENCE,
}
NAN = float("nan")


class Outgoing:
    """One answer on its way out, in messages of at least ``stream_tokens`` tokens but for the last.

    A chunk holds all that came while the last message was being written, so messages grow by
    themselves when the process is busy.
    """

    __slots__ = (
        "_calls",
        "_choice",
        "_detailed",
        "_least",
        "_params",
        "_reasoning",
        "_text",
        "_tokens",
    )

    def __init__(self, params: pb.Parameters, choice: int = 0) -> None:
        self._params = params
        self._least = params.stream_tokens
        self._detailed = (
            params.logprobs or params.top_logprobs > 0 or params.token_details or params.ranks
        )
        self._choice = choice
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[TokenOut] = []
        self._text = ""
        self._reasoning = ""
        self._calls: list[CallDelta] = []

    def take(self, chunk: Chunk | ChatChunk) -> pb.GenerateResponse | None:
        """Takes what came; returns the message if it is time for one. The last one always is."""
        self._tokens += chunk.tokens
        self._text += chunk.text
        if isinstance(chunk, ChatChunk):
            self._reasoning += chunk.reasoning
            self._calls += chunk.calls
        if len(self._tokens) < self._least and chunk.finish is None:
            return None
        return self._message(chunk.finish)

    def rest(self) -> pb.GenerateResponse | None:
        """Returns what has not been sent of an answer that broke off, if there is anything."""
        return self._message(None) if self._tokens else None

    def _message(self, finish: Finish | ChatFinish | None) -> pb.GenerateResponse:
        message = pb.GenerateResponse(
            token_ids=[token.id for token in self._tokens],
            text=self._text,
            reasoning=self._reasoning,
            choice=self._choice,
        )
        if self._detailed:
            self._add_details(message)
        for call in self._calls:
            message.tool_calls.add(
                index=call.index, id=call.id or "", name=call.name or "", arguments=call.arguments
            )
        if finish is not None:
            message.finish.CopyFrom(finish_of(finish, self._params))
        self._clear()
        return message

    def _add_details(self, message: pb.GenerateResponse) -> None:
        params, tokens = self._params, self._tokens
        if params.logprobs or params.top_logprobs:
            message.logprobs.extend(
                NAN if token.logprob is None else token.logprob for token in tokens
            )
        if params.top_logprobs:
            message.top_logprobs.extend(_top_of(token, params) for token in tokens)
        if params.token_details:
            message.token_texts.extend(token.text for token in tokens)
            message.special.extend(token.special for token in tokens)
        if params.ranks:
            message.ranks.extend(token.rank for token in tokens)


def finish_of(finish: Finish | ChatFinish, params: pb.Parameters) -> pb.Finish:
    """Returns the message about an answer's end."""
    calls: Sequence[Call] = ()
    called, thoughts = False, 0
    if isinstance(finish, ChatFinish):
        calls, called, thoughts = finish.calls, finish.called, finish.reasoning_tokens
        finish = finish.finish
    return pb.Finish(
        reason=pb.FINISH_REASON_TOOL_CALLS if called else FINISH_REASON[finish.reason],
        prompt_tokens=finish.prompt_tokens,
        generated_tokens=finish.generated_tokens,
        cached_tokens=finish.cached_tokens,
        seed=finish.seed,
        stop=finish.stop or "",
        prompt=_prompt_of(finish.prompt, params),
        tool_calls=[
            pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in calls
        ],
        reasoning_tokens=thoughts,
    )


def _prompt_of(tokens: Iterable[TokenOut], params: pb.Parameters) -> list[pb.PromptToken]:
    return [
        pb.PromptToken(
            id=token.id,
            text=token.text,
            logprob=token.logprob,
            top=_top_of(token, params) if params.top_logprobs and token.top else None,
            rank=token.rank or None,
        )
        for token in tokens
    ]


def _top_of(token: TokenOut, params: pb.Parameters) -> pb.TopLogprobs:
    top = token.top
    return pb.TopLogprobs(
        token_ids=[id_ for id_, _, _ in top],
        logprobs=[logprob for _, _, logprob in top],
        texts=[text for _, text, _ in top] if params.token_details else (),
    )
