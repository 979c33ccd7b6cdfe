"""A model's tokenizer: what ``tokenizer.json`` says, by the ``tokenizers`` library."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from router.text.detokenizer import Detokenizer, decoding_of
from router.text.template import ChatTemplate

TokenSpan = tuple[int, str, int, int]
"""Token id, its text, and where that is in the whole: a half-open range of code points."""

MORE_TEMPLATES = "additional_chat_templates/"
"""Folder of a model's further chat templates, as ``transformers`` writes them."""

_SHORT_CHARS = 4096
_SURROGATE = "the text holds half of a surrogate pair"


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        more_templates: Mapping[str, str] | None = None,
    ) -> None:
        # The file may carry the settings of a training run; prompts are never cut or padded.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = (
            None if chat_template is None else ChatTemplate(chat_template, bos_token, eos_token)
        )
        self.templates = {
            name: ChatTemplate(source, bos_token, eos_token)
            for name, source in (more_templates or {}).items()
        }
        added = tokenizer.get_added_tokens_decoder()
        self._added = frozenset(added)
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self._decoding = decoding_of(tokenizer, self.special_ids)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """Reads a model's files, keyed by name.

        They are ``tokenizer.json`` and, if given, ``tokenizer_config.json``,
        ``chat_template.jinja`` and further templates, ``additional_chat_templates/*.jinja``. Takes
        up to a second for large vocabularies: use a thread.

        Raises ValueError, with one line that names the file.
        """
        if "tokenizer.json" not in files:
            raise ValueError("the model has no tokenizer.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer.json cannot be read: {error}") from error
        config = _config(files.get("tokenizer_config.json", b"{}"))
        made = cls(
            tokenizer,
            chat_template=_template(config, files.get("chat_template.jinja")),
            bos_token=_token(config, "bos_token"),
            eos_token=_token(config, "eos_token"),
            more_templates=_more_templates(config, files),
        )
        for template in filter(None, (made.chat_template, *made.templates.values())):
            template.try_out()
        return made

    def template(self, name: str | None, *, tools: bool = False) -> ChatTemplate | None:
        """The chat template of this name, or None if there is none.

        Without a name it is the default one; for conversations with tools ``tool_use``, where
        there is one that shows them.
        """
        if name is None:
            special = self.templates.get("tool_use") if tools else None
            return special if special is not None and special.takes_tools else self.chat_template
        return self.chat_template if name == "default" else self.templates.get(name)

    def token_id(self, text: str) -> int | None:
        """The id of a text that the vocabulary has as one added token, or None."""
        token = self._tokenizer.token_to_id(text)
        return token if token in self._added else None

    def special_named(self, texts: Iterable[str]) -> dict[int, str]:
        """The special tokens whose names are among the texts, such as ``<|eot_id|>``."""
        found = ((self.token_id(text), text) for text in texts)
        return {token: text for token, text in found if token in self.special_ids}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Other threads run while a long one is encoded.

        Raises ValueError for text that is not Unicode (a lone surrogate).
        """
        tokenizer = self._tokenizer
        try:
            if len(text) <= _SHORT_CHARS:
                return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            # The batch call is the one that releases the interpreter lock; it costs 40 us more.
            batch = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise ValueError(_SURROGATE) from error
        return batch[0].ids

    def encode_offsets(self, text: str, add_special_tokens: bool) -> list[TokenSpan]:
        """Tokens with their places. A token added by the tokenizer has an empty range.

        Several tokens that make up one character all have that character's range and text.
        Raises ValueError for text that is not Unicode (a lone surrogate).
        """
        try:
            batch = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise ValueError(_SURROGATE) from error
        return [
            (token, text[start:end] or self.token_text(token), start, end)
            for token, (start, end) in zip(batch[0].ids, batch[0].offsets, strict=True)
        ]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of these tokens; ids that stand for nothing are skipped."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def ids(self) -> frozenset[int]:
        """Every id that stands for a token."""
        return frozenset(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def token_text(self, token: int) -> str:
        """The text of one token behind other text; U+FFFD for bytes that are no character."""
        text = self._decoding.whole(token)
        return self.decode([token], skip_special_tokens=False) if text is None else text

    def token_bytes(self, token: int, text: str) -> bytes:
        """The bytes of one token of an answer, to which it added ``text``.

        They are the token's own, so that those of a character's tokens are that character together.
        """
        part = self._decoding.part(token)
        if part is not None:
            return part
        # The text may begin with what was held back of tokens before, or lack a leading space.
        own = self._decoding.whole(token)
        return (own if own and text.endswith(own) else text).encode()

    def piece(self, token: int) -> str:
        """The token as the vocabulary has it, "" for an id that stands for nothing."""
        return self._tokenizer.id_to_token(token) or ""

    def is_special(self, token: int) -> bool:
        """Whether the token is one of the model's control tokens, not text."""
        return token in self.special_ids

    def detokenizer(self) -> Detokenizer:
        """A new stream of tokens to turn into text."""
        return Detokenizer(self._decoding)


def _config(data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer_config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("tokenizer_config.json is not a JSON object")  # noqa: TRY004 - bad data, no bug
    return config


def _token(config: Mapping[str, Any], name: str) -> str | None:
    """A special token, written as a string or as an object with ``content``."""
    value = config.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template(config: Mapping[str, Any], file: bytes | None) -> str | None:
    """The chat template: a file of its own, or in the config a string or a list of named ones."""
    if file is not None:
        return _text("chat_template.jinja", file)
    value = config.get("chat_template")
    return value if isinstance(value, str) else _named(value).get("default")


def _more_templates(config: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, str]:
    """The templates beside the default one: those of the config's list, and files."""
    # A file takes the place of all that the config has: it is newer, or the operator's own.
    listed = {} if "chat_template.jinja" in files else _named(config.get("chat_template"))
    found = {name: source for name, source in listed.items() if name != "default"}
    for path, data in files.items():
        if path.startswith(MORE_TEMPLATES) and path.endswith(".jinja"):
            found[path[len(MORE_TEMPLATES) : -len(".jinja")]] = _text(path, data)
    return found


def _named(value: Any) -> dict[str, str]:
    """Templates as a list of objects with name and template, as they were written until 2025."""
    entries = value if isinstance(value, list) else []
    pairs = [(e.get("name"), e.get("template")) for e in entries if isinstance(e, dict)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from error
