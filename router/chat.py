"""One chat: lay out the conversation, generate, and read the answer as text, thoughts and calls.

Every protocol's chat comes through here, as every generation comes through ``router/service.py``.
"""

from types import TracebackType
from typing import Self

from router.conversation import ChatAsk, ChatChunk
from router.fleet import ModelCard
from router.service import Generation, Service


class ChatService:
    """Answers conversations by means of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, ask: ChatAsk) -> "ChatGeneration":
        """Checks, lays out and submits a chat.

        Raises RequestError as ``Service.generate`` and ``Service.render_chat`` do.
        """
        raise NotImplementedError


class ChatGeneration:
    """An answer on its way; to be used as ``Generation`` is."""

    def __init__(self, answer: Generation) -> None:
        self._answer = answer
        self.model: ModelCard = answer.model
        self.prompt_tokens = answer.prompt_tokens

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatChunk:
        """Waits for what comes next."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._answer.cancel()
