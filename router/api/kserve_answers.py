"""Answers as tensors: Triton's names for a text and for what there is to know of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from router.api.kserve_tensors import Output
from router.ask import Finish, TokenOut
from router.core.events import Reason


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of an answer, or all of it. ``logprob`` is the sum over the answer until here."""

    text: str
    tokens: Sequence[TokenOut]
    finish: Finish | None
    prompt_tokens: int
    logprob: float


def logprob_sum(tokens: Sequence[TokenOut]) -> float:
    """The log probability of these tokens together, as far as it is known."""
    return sum(token.logprob for token in tokens if token.logprob is not None)


def outputs_of(
    names: Sequence[str], pieces: Sequence[Piece], shape: tuple[int, ...]
) -> list[Output]:
    """Returns the named tensors, with one element (or row) for each piece, in this shape."""
    found = []
    for name in names:
        if name == "output_log_probs":
            found.append(_table(name, pieces))
        else:
            datatype, value = MAKERS[name]
            found.append(Output(name, datatype, shape, [value(piece) for piece in pieces]))
    return found


def _reason(finish: Finish | None) -> str:
    """The words of vLLM, and its "None" for an answer that goes on."""
    if finish is None:
        return "None"
    return "length" if finish.reason is Reason.LENGTH else "stop"


def _table(name: str, pieces: Sequence[Piece]) -> Output:
    """A row of log probabilities for each piece, filled up with zeros to the longest."""
    width = max(len(piece.tokens) for piece in pieces)
    values: list[float] = []
    for piece in pieces:
        row = [token.logprob or 0.0 for token in piece.tokens]
        values += row + [0.0] * (width - len(row))
    return Output(name, "FP32", (len(pieces), width), values)


def _logprobs(tokens: Sequence[TokenOut]) -> str:
    """As Triton's vLLM backend writes them: JSON, an object from ids to entries for each token."""
    return orjson.dumps([_entries(token) for token in tokens]).decode()


def _entries(token: TokenOut) -> dict[str, Any]:
    found = {
        str(id_): {"logprob": logprob, "rank": rank, "decoded_token": text}
        for rank, (id_, text, logprob) in enumerate(token.top, start=1)
    }
    if str(token.id) not in found:
        found[str(token.id)] = {
            "logprob": token.logprob,
            "rank": None,
            "decoded_token": token.text,
        }
    return found


MAKERS: Mapping[str, tuple[str, Callable[[Piece], Any]]] = {
    "text_output": ("BYTES", lambda piece: piece.text),
    "finish_reason": ("BYTES", lambda piece: _reason(piece.finish)),
    "cumulative_logprob": ("FP32", lambda piece: piece.logprob),
    "cum_log_probs": ("FP32", lambda piece: piece.logprob),
    "logprobs": ("BYTES", lambda piece: _logprobs(piece.tokens)),
    "num_input_tokens": ("UINT32", lambda piece: piece.prompt_tokens),
    "num_output_tokens": ("UINT32", lambda piece: len(piece.tokens)),
}
"""Datatype and element of each output that has one for each prompt."""
