"""Tokens to text, one token at a time, exactly.

The pieces that come out, joined, equal the tokenizer's own decoding of all tokens, and no piece
ends inside a character. Decoders differ in what a token's text depends on, so there are three ways:

* ``ByteLevel`` (GPT-2 and most models since): a token is a string of bytes, the text is their
  concatenation as UTF-8. Bytes of an unfinished character are held back.
* Decoders that treat tokens one by one (``Metaspace``, SentencePiece's ``ByteFallback`` sequence,
  ``WordPiece``): a token has one text wherever it stands, but for the start of the answer, where a
  leading space is dropped, and for runs of byte tokens, which are read as a whole: one invalid
  byte spoils its run. Both are held back until they are certain.
* Anything else: decode a window of the last tokens with and without the new one.

A token whose text depends on nothing is looked up in a table, which fills as tokens appear.
"""

import codecs
import json
from typing import Any, Protocol

import tokenizers

Pair = tuple[str, str]
"""What a token adds to the text with special tokens shown, and with them left out."""

_REPLACEMENT = "\ufffd"
_WINDOW = 8  # tokens that a decoder of unknown kind is taken to look back
_HELD_MAX = 8  # tokens that may be held back there for want of a character's last byte


class View(Protocol):
    """The text of one stream of tokens. ``ready`` is false while anything is held back."""

    ready: bool

    def push(self, token: int) -> str:
        """Takes a token, returns the text that became final."""

    def flush(self) -> str:
        """Returns the rest of the text: no more tokens will come."""


class Decoding(Protocol):
    """What all detokenizers of one tokenizer share."""

    pairs: dict[int, Pair]
    special: frozenset[int]

    def whole(self, token: int) -> str | None:
        """The token's text behind other text, or None if that depends on its neighbours."""

    def part(self, token: int) -> bytes | None:
        """The token's bytes if they may be a part of a character, else None."""

    def view(self) -> View:
        """A new stream."""


class Detokenizer:
    """Both texts of one stream of tokens."""

    __slots__ = ("_decoding", "_pairs", "_plain", "_ready", "_shown")

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._pairs = decoding.pairs
        self._shown = decoding.view()
        self._plain = decoding.view()
        self._ready = self._shown.ready and self._plain.ready

    def push(self, token: int) -> Pair:
        """Takes a token, returns what it adds to the two texts."""
        if self._ready:
            pair = self._pairs.get(token)
            if pair is not None:
                return pair
        return self._push_slowly(token)

    def hide(self, token: int) -> str:
        """Takes a token as if it were special: it adds to the text with special tokens only."""
        text = self._shown.push(token)
        self._ready = self._shown.ready and self._plain.ready
        return text

    def flush(self) -> Pair:
        """Returns the rest of both texts: no more tokens will come."""
        return self._shown.flush(), self._plain.flush()

    def _push_slowly(self, token: int) -> Pair:
        special = token in self._decoding.special
        if self._ready:
            text = self._decoding.whole(token)
            if text is not None:
                pair = self._pairs[token] = (text, "" if special else text)
                return pair
        shown = self._shown.push(token)
        plain = "" if special else self._plain.push(token)
        self._ready = self._shown.ready and self._plain.ready
        return shown, plain


def decoding_of(tokenizer: tokenizers.Tokenizer, special: frozenset[int]) -> Decoding:
    """Chooses the way that is exact for this tokenizer's decoder."""
    decoder = tokenizer.decoder
    kind = None if decoder is None else json.loads(decoder.__getstate__())
    steps = _steps(kind)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return ByteDecoding(tokenizer, special)
    anchor = _anchor(tokenizer, special)
    if anchor is not None and _is_local(steps):
        fallback = any(step["type"] == "ByteFallback" for step in steps)
        return PieceDecoding(tokenizer, special, anchor, fallback)
    return WindowDecoding(tokenizer, special, anchor)


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


def _is_local(steps: list[dict[str, Any]]) -> bool:
    """Whether a token's text depends on its neighbours only at the start and in byte runs."""
    fused = False
    for step in steps:
        match step["type"]:
            case "Metaspace" | "WordPiece" | "ByteFallback":
                if fused:
                    return False
            case "Fuse":
                fused = True
            case "Strip":
                if fused and step["stop"]:
                    return False
            case "Replace":
                # Behind Fuse it sees the whole text: a longer pattern could lie across tokens.
                if fused and len(step["pattern"].get("String", "..")) != 1:
                    return False
            case _:
                return False
    return True


def _anchor(tokenizer: tokenizers.Tokenizer, special: frozenset[int]) -> int | None:
    """A token to put before others so that they are not at the start of the text."""
    for token in range(tokenizer.get_vocab_size()):
        if token in special or _byte_of(tokenizer.id_to_token(token)) is not None:
            continue
        text = tokenizer.decode([token], skip_special_tokens=False)
        if text.isascii() and text.isalnum():
            return token
    return None


def _byte_of(piece: str | None) -> int | None:
    """The byte that a SentencePiece byte token such as ``<0x0A>`` stands for, or None."""
    if piece is None or len(piece) != 6 or not piece.startswith("<0x") or piece[5] != ">":
        return None
    try:
        return int(piece[3:5], 16)
    except ValueError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """Character to byte in byte-level vocabularies: ``bytes_to_unicode`` of GPT-2's encoder.py."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    shifted = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in own} | shifted


_BYTE_ALPHABET = _byte_alphabet()


class ByteDecoding:
    """Byte-level vocabularies: the text is the UTF-8 of all tokens' bytes in a row."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: frozenset[int]) -> None:
        self.special = special
        self.pairs: dict[int, Pair] = {}
        self._piece = tokenizer.id_to_token
        self._bytes: dict[int, bytes] = {}

    def data(self, token: int) -> bytes:
        """The token's bytes; none if there is no such token, which decoding skips."""
        data = self._bytes.get(token)
        if data is None:
            piece = self._piece(token)
            if piece is None:
                return b""
            data = self._bytes[token] = _piece_bytes(piece)
        return data

    def whole(self, token: int) -> str | None:
        """The token's text if its bytes are whole characters."""
        data = self.data(token)
        try:
            # An unknown token has no text, but unknown ids must not fill the table.
            return data.decode() if data else None
        except UnicodeDecodeError:
            return None

    def part(self, token: int) -> bytes | None:
        """The token's bytes if they are not whole characters."""
        return None if self.whole(token) is not None else self.data(token) or None

    def view(self) -> "ByteView":
        """A new stream."""
        return ByteView(self)


def _piece_bytes(piece: str) -> bytes:
    """As the ByteLevel decoder does: a piece with any other character stands for itself."""
    try:
        return bytes([_BYTE_ALPHABET[char] for char in piece])
    except KeyError:
        return piece.encode()


class ByteView:
    """A stream of bytes read as UTF-8, with U+FFFD for what is no character."""

    __slots__ = ("_data", "_held", "ready")

    def __init__(self, decoding: ByteDecoding) -> None:
        self._data = decoding.data
        self._held = b""
        self.ready = True

    def push(self, token: int) -> str:
        """Takes a token; the bytes of an unfinished character are held back."""
        data = self._held + self._data(token)
        text, used = codecs.utf_8_decode(data, "replace")
        self._held = data[used:]
        self.ready = not self._held
        return text

    def flush(self) -> str:
        """Returns U+FFFD if a character was left unfinished."""
        text = self._held.decode("utf-8", "replace")
        self._held, self.ready = b"", True
        return text


class PieceDecoding:
    """Decoders that treat tokens one by one, apart from the start and from runs of byte tokens."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, special: frozenset[int], anchor: int, fallback: bool
    ) -> None:
        self.special = special
        self.pairs: dict[int, Pair] = {}
        self._tokenizer = tokenizer
        self._anchor = anchor
        self._skip = len(self.start([anchor]))
        self._fallback = fallback

    def start(self, tokens: list[int]) -> str:
        """The text of these tokens at the start of an answer."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def behind(self, tokens: list[int]) -> str:
        """The text of these tokens behind other text."""
        return self.start([self._anchor, *tokens])[self._skip :]

    def joins(self, token: int) -> bool:
        """Whether the token has to be read together with the byte tokens beside it."""
        return self._fallback and _byte_of(self._tokenizer.id_to_token(token)) is not None

    def knows(self, token: int) -> bool:
        """Whether there is such a token; decoding skips others."""
        return self._tokenizer.id_to_token(token) is not None

    def whole(self, token: int) -> str | None:
        """The token's text, unless it is a byte or unknown."""
        if self.joins(token) or not self.knows(token):
            return None
        return self.behind([token])

    def part(self, token: int) -> bytes | None:
        """The byte that a token is."""
        byte = _byte_of(self._tokenizer.id_to_token(token)) if self._fallback else None
        return None if byte is None else bytes([byte])

    def view(self) -> "PieceView":
        """A new stream."""
        return PieceView(self)


class PieceView:
    """A stream that holds back runs of byte tokens, and the start until it has a text."""

    __slots__ = ("_decoding", "_held", "_started", "ready")

    def __init__(self, decoding: PieceDecoding) -> None:
        self._decoding = decoding
        self._held: list[int] = []
        self._started = False
        self.ready = False

    def push(self, token: int) -> str:
        """Takes a token, returns the text up to it unless more tokens can still change that."""
        if not self._decoding.knows(token):
            return ""
        self._held.append(token)
        if self._decoding.joins(token):
            self.ready = False
            return ""
        text = self._text()
        if text or self._started:
            self._held = []
            self._started = self.ready = True
        return text

    def flush(self) -> str:
        """Returns what was held back."""
        text = self._text()
        self._held = []
        return text

    def _text(self) -> str:
        decode = self._decoding.behind if self._started else self._decoding.start
        return decode(self._held)


class WindowDecoding:
    """Decoders of unknown kind."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, special: frozenset[int], anchor: int | None
    ) -> None:
        self.special = special
        self.pairs: dict[int, Pair] = {}
        self.anchor = () if anchor is None else (anchor,)
        self._tokenizer = tokenizer

    def decode(self, tokens: list[int]) -> str:
        """The tokenizer's own decoding."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def whole(self, token: int) -> None:
        """Nothing is known of any token."""

    def part(self, token: int) -> None:
        """Nothing is known of any token."""

    def view(self) -> "WindowView":
        """A new stream."""
        return WindowView(self)


class WindowView:
    """A stream whose new text is the difference a token makes to a window of the last ones."""

    __slots__ = ("_all", "_decoding", "_held", "_said", "_text", "_window", "ready")

    def __init__(self, decoding: WindowDecoding) -> None:
        self._decoding = decoding
        self._all: list[int] = []
        self._window: list[int] = []
        self._said = ""  # text of the window that has been returned
        self._text: list[str] = []
        self._held = 0
        self.ready = False

    def push(self, token: int) -> str:
        """Takes a token, returns the text that became final as far as the window tells."""
        self._all.append(token)
        self._window.append(token)
        text = self._decoding.decode(self._window)
        if text.endswith(_REPLACEMENT) and self._held < _HELD_MAX:
            self._held += 1
            return ""
        self._held = 0
        new = text[len(self._said) :] if text.startswith(self._said) else ""
        self._said = text
        if len(self._window) > 4 * _WINDOW:
            self._window = [*self._decoding.anchor, *self._window[-_WINDOW:]]
            self._said = self._decoding.decode(self._window)
        self._text.append(new)
        return new

    def flush(self) -> str:
        """Returns what the decoding of all tokens has beyond the text so far."""
        said, whole = "".join(self._text), self._decoding.decode(self._all)
        return whole[len(said) :] if whole.startswith(said) else ""
