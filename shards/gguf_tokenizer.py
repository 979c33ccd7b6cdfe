"""Converts the vocabulary in a GGUF file to the files that the ``tokenizers`` library reads.

Two kinds are known: byte-level BPE (``tokenizer.ggml.model`` is ``gpt2``) and SentencePiece BPE
(``llama``). Conversions are cached under the user's cache folder, by a hash of what they depend on.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from shards.engines.base import ModelError
from shards.pretokenizers import names, word_cut

# Part of the cache key: raise it when the conversion changes.
CONVERSION = 2
# tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "▁"
# SentencePiece models whose files do not say: llama.cpp's defaults.
_SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}
_PHI3_KEEP = ("<unk>", "<s>", "<|endoftext|>")
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

_NAMED_TEMPLATE = "tokenizer.chat_template."
_MORE_TEMPLATES = "additional_chat_templates/"

Metadata = Mapping[str, Any]


def tokenizer_files(path: Path, metadata: Metadata) -> dict[str, bytes]:
    """The tokenizer files of a GGUF model, from the cache if they are there.

    Further chat templates, which need no conversion, are in ``additional_chat_templates``.
    Raises ``ModelError`` with one line if the vocabulary is of a kind that is not known.
    """
    return _converted(path, metadata) | {
        f"{_MORE_TEMPLATES}{key.removeprefix(_NAMED_TEMPLATE)}.jinja": text.encode()
        for key, text in metadata.items()
        if key.startswith(_NAMED_TEMPLATE) and isinstance(text, str)
    }


def _converted(path: Path, metadata: Metadata) -> dict[str, bytes]:
    folder = _cache_folder() / _key(metadata)
    with suppress(OSError):
        return {
            name: (folder / name).read_bytes()
            for name in (*_FILES[:2], *_FILES[2:])
            if name != _FILES[2] or "tokenizer.chat_template" in metadata
        }
    files = convert(path, metadata)
    with suppress(OSError):
        _store(folder, files)
    return files


def convert(path: Path, metadata: Metadata) -> dict[str, bytes]:
    """The conversion itself."""
    kind = metadata.get("tokenizer.ggml.model")
    match kind:
        case "gpt2":
            tokenizer, adds_bos = _byte_level(path, metadata)
        case "llama":
            tokenizer, adds_bos = _sentencepiece(metadata), True
        case _:
            raise ModelError(
                f"model file {path}: its vocabulary is of kind {kind}, which cannot be converted;"
                " known are gpt2 and llama"
            )
    _add_tokens(tokenizer, metadata)
    config = _config(metadata, adds_bos=adds_bos)
    _add_ends(tokenizer, config)
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode(),
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return files


def _byte_level(path: Path, metadata: Metadata) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    cut = word_cut(name)
    if cut is None:
        raise ModelError(
            f"model file {path}: its pre-tokenizer {name} is not known;"
            f" known are {', '.join(names())}"
        )
    vocab = _vocab(metadata)
    merges = []
    for line in metadata.get("tokenizer.ggml.merges", ()):
        left, _, right = line.partition(" ")
        if left in vocab and right in vocab and left + right in vocab:
            merges.append((left, right))
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=cut.whole_words)
    tokenizer = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    lost = "".join(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()))
    # A byte that is no token leaves no trace, but what stood on its two sides must not merge.
    gaps = [pre_tokenizers.Split(Regex(f"[{re.escape(lost)}]"), "removed")] if lost else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, level, *gaps])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, cut.adds_bos


def _sentencepiece(metadata: Metadata) -> Tokenizer:
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", _SPM_IDS["unknown"])
    vocab = _vocab(metadata)
    model = models.BPE(
        vocab=vocab,
        merges=list(_merges(metadata, vocab)),
        unk_token=tokens[unknown] if unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(metadata: Metadata, vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Merges that have the effect of the scores: the pair with the best result goes first.

    As ``SentencePieceExtractor`` of the transformers library does.
    """
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    scores: Sequence[float] = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    kinds = _kinds(metadata)
    whole = (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    order = sorted(
        (token for token, kind in enumerate(kinds) if kind not in whole),
        key=lambda token: (-scores[token], token),
    )
    find = vocab.get
    for token in order:
        text = tokens[token]
        pairs = []
        for cut in range(1, len(text)):
            left = find(text[:cut])
            if left is not None:
                right = find(text[cut:])
                if right is not None:
                    pairs.append((left, right))
        for left, right in sorted(pairs):
            yield tokens[left], tokens[right]


def _kinds(metadata: Metadata) -> Sequence[int]:
    """The kind of each token; without a list all are plain text."""
    kinds: Sequence[int] | None = metadata.get("tokenizer.ggml.token_type")
    return kinds or [_NORMAL] * len(metadata["tokenizer.ggml.tokens"])


def _vocab(metadata: Metadata) -> dict[str, int]:
    return {text: token for token, text in enumerate(metadata["tokenizer.ggml.tokens"])}


def _add_tokens(tokenizer: Tokenizer, metadata: Metadata) -> None:
    """Tokens that are found in text as a whole, before anything else."""
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    # Files do not say which tokens swallow the white space behind them; llama.cpp knows this one
    # family by its name.
    name = str(metadata.get("general.name", "")).lower()
    strips = "phi-3" in name or "phi3" in name
    added = [
        AddedToken(
            tokens[token],
            special=kind != _USER_DEFINED,
            normalized=False,
            rstrip=strips and tokens[token] not in _PHI3_KEEP,
        )
        for token, kind in enumerate(_kinds(metadata))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)


def _config(metadata: Metadata, *, adds_bos: bool) -> dict[str, Any]:
    """The parts of ``tokenizer_config.json`` that readers look at."""
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    defaults = _SPM_IDS if metadata["tokenizer.ggml.model"] == "llama" else {}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id", defaults.get(key))
        known = token is not None and token < len(tokens)
        config[f"{name}_token"] = tokens[token] if known else None
        config[f"{name}_token_id"] = token if known else None
    config["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos))
    config["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    config["clean_up_tokenization_spaces"] = False
    arch = metadata.get("general.architecture", "")
    config["model_max_length"] = metadata.get(f"{arch}.context_length")
    return config


def _add_ends(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Lets the tokenizer add the first and last token where the model wants them."""
    first = config["bos_token"] if config["add_bos_token"] else None
    last = config["eos_token"] if config["add_eos_token"] else None
    ends = [text for text in (first, last) if text is not None]
    if ends:
        single = [text for text in (first, "$A", last) if text is not None]
        pair = [text for text in (first, "$A", last, first, "$B", last) if text is not None]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[f"{text}:1" if at >= len(single) else text for at, text in enumerate(pair)],
            special_tokens=[(text, tokenizer.token_to_id(text)) for text in dict.fromkeys(ends)],
        )


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "roundhouse" / "tokenizers"


def _key(metadata: Metadata) -> str:
    """A hash of everything in the file that the conversion looks at."""
    total = hashlib.sha256(f"{CONVERSION} {tokenizers.__version__}".encode())
    arch = metadata.get("general.architecture", "")
    for name in sorted(metadata):
        if name.startswith("tokenizer.") or name in ("general.name", f"{arch}.context_length"):
            total.update(f"{name}\0".encode())
            total.update(repr(metadata[name]).encode())
    return total.hexdigest()


def _store(folder: Path, files: Mapping[str, bytes]) -> None:
    """Puts all files there at once: a reader finds the whole folder or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as made:
        fresh = Path(made) / "files"
        fresh.mkdir()
        for name, data in files.items():
            (fresh / name).write_bytes(data)
        fresh.rename(folder)
