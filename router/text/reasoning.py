"""The thoughts of a model, told from its answer.

A model that reasons writes its thoughts first, between two markers. The first marker may stand at
the end of the prompt already, as some chat templates write it for the model.
"""

from dataclasses import dataclass

_SPACE = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Thoughts:
    """The markers between which thoughts stand."""

    opener: str
    closer: str

    def opened_by(self, prompt: str) -> bool:
        """Whether an answer to this prompt starts within thoughts."""
        return prompt.rstrip(_SPACE).endswith(self.opener)

    def closed_by(self, prompt: str) -> bool:
        """Whether the prompt has ended the thoughts, so that the answer has none."""
        return prompt.rstrip(_SPACE).endswith(self.closer)


DEFAULT = Thoughts("<think>", "</think>")
THOUGHTS = (
    DEFAULT,  # DeepSeek R1 and V3.1, Qwen 3, QwQ, SmolLM3, GLM 4.5, MiniMax and many more
    Thoughts("[THINK]", "[/THINK]"),  # Magistral
    Thoughts("<seed:think>", "</seed:think>"),  # Seed-OSS
    Thoughts("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
)
"""The markers of known models, by their chat templates."""


def thoughts_of(template: str | None) -> Thoughts | None:
    """The markers that a chat template speaks of, or None."""
    if template is None:
        return None
    return next((row for row in THOUGHTS if row.opener in template or row.closer in template), None)


class ThoughtSplitter:
    """Splits a stream of text into thoughts and answer, whatever pieces it comes in.

    Thoughts are looked for at the start only, where ``opened`` says they have begun. White space at
    their borders belongs to neither, an empty line between thoughts and answer least of all.
    """

    __slots__ = ("_at_start", "_held", "_markers", "_open", "_over")

    def __init__(self, markers: Thoughts, opened: bool) -> None:
        self._markers = markers
        self._open = opened
        self._over = False
        self._at_start = True  # of the thoughts, or of the answer behind them
        self._held = ""

    @property
    def settled(self) -> bool:
        """Whether thoughts are over, or never were: what comes is the answer, as it is."""
        return self._over and not self._at_start

    @property
    def thinking(self) -> bool:
        """Whether the stream is within thoughts."""
        return self._open

    def push(self, text: str) -> tuple[str, str]:
        """Takes the next piece; returns what it adds to the thoughts and to the answer."""
        if self.settled:
            return "", text
        self._held += text
        if not self._open and not self._over:
            self._look()
        thoughts = self._think() if self._open else ""
        return thoughts, self._answer() if self._over else ""

    def end(self) -> tuple[str, str]:
        """What was held back: no more text will come."""
        held, self._held = self._held, ""
        if self._open:
            return held.rstrip(_SPACE), ""
        return "", "" if self._over else held

    def _look(self) -> None:
        """Decides whether the answer begins with thoughts, as soon as that is certain."""
        word, opener = self._held.lstrip(_SPACE), self._markers.opener
        if word.startswith(opener):
            self._open, self._held = True, word.removeprefix(opener)
        elif not opener.startswith(word):
            self._over, self._at_start = True, False

    def _think(self) -> str:
        if self._at_start:
            self._held = self._held.lstrip(_SPACE)
            if not self._held:
                return ""
        found = self._held.find(self._markers.closer)
        if found < 0:
            return self._sure()
        thoughts = self._held[:found].rstrip(_SPACE)
        self._held = self._held[found + len(self._markers.closer) :]
        self._open, self._over, self._at_start = False, True, True
        return thoughts

    def _sure(self) -> str:
        """What can be neither part of the closing marker nor the white space before it."""
        held, closer = self._held, self._markers.closer
        part = next(n for n in range(len(closer) - 1, -1, -1) if held.endswith(closer[:n]))
        sure = held[: len(held) - part].rstrip(_SPACE)
        self._held = held[len(sure) :]
        self._at_start = self._at_start and not sure
        return sure

    def _answer(self) -> str:
        if self._at_start:
            self._held = self._held.lstrip(_SPACE)
        text, self._held = self._held, ""
        self._at_start = self._at_start and not text
        return text
