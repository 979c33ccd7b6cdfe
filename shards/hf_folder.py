"""A model folder as the Hugging Face libraries write it: configuration and tokenizer files.

Weights are read elsewhere. Everything here needs only the standard library.
"""

import json
from pathlib import Path
from typing import Any

from shards.engines.base import ModelError

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"


def is_hf_folder(path: Path) -> bool:
    """Whether the folder has a configuration; a folder of GGUF files has none."""
    return (path / "config.json").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ``ModelError`` with one line that names the file."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"model file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model file {path}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"model file {path}: holds no JSON object")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``. Raises ``ModelError``."""
    return read_json(folder / "config.json")


def eos_token_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer: ``generation_config.json``'s, or else ``config.json``'s."""
    given = None
    if (folder / "generation_config.json").is_file():
        given = read_json(folder / "generation_config.json").get("eos_token_id")
    given = config.get("eos_token_id") if given is None else given
    if given is None:
        raise ModelError(f"model folder {folder}: names no end-of-sequence token")
    return tuple(given) if isinstance(given, list) else (int(given),)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``, as far as present.

    And the templates in ``additional_chat_templates``. A template inside ``tokenizer_config.json``
    becomes a file of its own, unless there is one.
    Raises ``ModelError`` if there is no ``tokenizer.json``: nothing else can be read without
    running code of the model's own.
    """
    if not (folder / TOKENIZER).is_file():
        raise ModelError(
            f"model folder {folder}: has no {TOKENIZER}; save the tokenizer in the fast format"
        )
    files = {TOKENIZER: (folder / TOKENIZER).read_bytes()}
    config = {}
    if (folder / TOKENIZER_CONFIG).is_file():
        config = read_json(folder / TOKENIZER_CONFIG)
    files[TOKENIZER_CONFIG] = json.dumps(config).encode()
    template = config.get("chat_template")
    if (folder / CHAT_TEMPLATE).is_file():
        files[CHAT_TEMPLATE] = (folder / CHAT_TEMPLATE).read_bytes()
    elif isinstance(template, str):
        files[CHAT_TEMPLATE] = template.encode()
    for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja")):
        files[f"{MORE_TEMPLATES}/{path.name}"] = path.read_bytes()
    return files
