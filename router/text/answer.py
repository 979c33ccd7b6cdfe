"""An answer on its way, split into thoughts, text and tool calls."""

from dataclasses import dataclass, field

from router.conversation import Call, CallDelta
from router.text.reasoning import ThoughtSplitter
from router.text.tools.reader import ToolReader


@dataclass(slots=True)
class Parts:
    """What a piece of an answer consists of; each part may be empty."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class AnswerReader:
    """Splits the text of one answer; without splitter and tools all of it is text."""

    def __init__(self, splitter: ThoughtSplitter | None, tools: ToolReader | None) -> None:
        self._splitter = splitter
        self._tools = tools
        self._text: list[str] = []
        self._reasoning: list[str] = []

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """All thoughts so far."""
        return "".join(self._reasoning)

    @property
    def calls(self) -> tuple[Call, ...]:
        """All calls so far."""
        return () if self._tools is None else self._tools.calls

    @property
    def thinking(self) -> bool:
        """Whether the answer is within thoughts."""
        return self._splitter is not None and self._splitter.thinking

    @property
    def settled(self) -> bool:
        """Whether all that is still to come is text."""
        return self._tools is None and (self._splitter is None or self._splitter.settled)

    @property
    def whole(self) -> bool:
        """Whether every call is complete."""
        return self._tools is None or not self._tools.broken

    def keep(self, text: str) -> None:
        """Takes the next piece of an answer that is settled, which comes out as it is."""
        self._text.append(text)

    def push(self, text: str, *, last: bool = False) -> Parts:
        """Takes the next piece; with ``last`` everything that was held back comes out, too."""
        parts = Parts(text)
        if self._splitter is not None:
            parts.reasoning, parts.text = self._splitter.push(text)
            if last:
                thoughts, rest = self._splitter.end()
                parts.reasoning += thoughts
                parts.text += rest
        if self._tools is not None:
            said = self._tools.push(parts.text)
            parts.text, parts.calls = said.text, said.calls
            if last:
                self._end(self._tools, parts)
        self._keep(parts)
        return parts

    def _end(self, tools: ToolReader, parts: Parts) -> None:
        said = tools.end()
        parts.text += said.text
        parts.calls += said.calls

    def _keep(self, parts: Parts) -> None:
        if parts.text:
            self._text.append(parts.text)
        if parts.reasoning:
            self._reasoning.append(parts.reasoning)
