"""From a model's path to a model of the ``transformers`` library with its weights in memory.

Two forms are read: folders of safetensors, and GGUF files, whose numbers are dequantised. Nothing
is unpickled, and no code of a model's own is run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import safetensors
import torch
import transformers
from transformers.utils import logging as transformers_logging

from shards import gguf_tokenizer, hf_folder
from shards.engines.base import ModelError, Progress
from shards.engines.torch_model import check_architecture
from shards.gguf_file import NO_MODEL, gguf_file_of, read_metadata

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What the libraries raise for files that are missing, cut short or of another model.
_FAULTS = (OSError, ValueError, KeyError, RuntimeError, ImportError, safetensors.SafetensorError)
_SHOWN_MAX = 300


class Checkpoint:
    """A model on disk: its configuration and tokenizer are read, its weights are not yet.

    Raises ``ModelError`` with one line for whatever is missing, damaged or not servable.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path if hf_folder.is_hf_folder(path) else None
        self.gguf = None if self.folder else gguf_file_of(path, NO_MODEL)
        self.where = str(self.folder or self.gguf)
        self._metadata = read_metadata(self.gguf) if self.gguf else {}
        if self.folder:
            kind = hf_folder.read_config(self.folder).get("model_type")
            if kind not in transformers.CONFIG_MAPPING:
                raise ModelError(
                    f"model folder {self.folder}: transformers {transformers.__version__} knows no"
                    f" architecture called {kind}, and code that comes with a model is never run"
                )
            self._parts = _parts(self.folder)
        self.config = self._read_config()
        check_architecture(self.config, self.where)

    def _read_config(self) -> Any:
        try:
            return transformers.AutoConfig.from_pretrained(*self._names()[0], **self._names()[1])
        except _FAULTS as error:
            raise self.fault(error) from error

    def _names(self) -> tuple[tuple[str, ...], dict[str, str]]:
        """How the library is told which model is meant."""
        if self.gguf is None:
            return (str(self.folder),), {}
        return (str(self.gguf.parent),), {"gguf_file": self.gguf.name}

    def fault(self, error: BaseException) -> ModelError:
        """What a library says about this model, in one line."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        kind = "folder" if self.folder else "file"
        return ModelError(f"model {kind} {self.where}: {lines[0][:_SHOWN_MAX]}")

    @property
    def stored_dtype(self) -> str:
        """``float32`` and so on as the configuration says, or empty."""
        stored = getattr(self.config.get_text_config(), "dtype", None)
        return str(stored or "").removeprefix("torch.")

    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        if self.folder:
            return hf_folder.eos_token_ids(self.folder, hf_folder.read_config(self.folder))
        return gguf_ends(self._metadata)

    def tokenizer_files(self) -> dict[str, bytes]:
        """See ``Engine``."""
        if self.folder:
            return hf_folder.tokenizer_files(self.folder)
        assert self.gguf is not None, "a checkpoint is a folder or a GGUF file"
        return gguf_tokenizer.tokenizer_files(self.gguf, self._metadata)

    def weights(self) -> dict[str, Path]:
        """Which safetensors file holds which tensor."""
        found: dict[str, Path] = {}
        for part in self._parts:
            with self.opened(part) as file:
                found.update(dict.fromkeys(file.keys(), part))
        return found

    @contextmanager
    def opened(self, part: Path) -> Iterator[Any]:
        """A safetensors file. Raises ``ModelError`` that names it."""
        try:
            with safetensors.safe_open(part, framework="pt") as file:
                yield file
        except safetensors.SafetensorError as error:
            raise ModelError(f"model file {part}: is damaged or cut short: {error}") from error

    def load(self, dtype: torch.dtype, device: torch.device, progress: Progress) -> Any:
        """The whole model on one device, in evaluation mode."""
        if self.folder:
            self.weights()  # names a damaged part, which the library would not
        more: dict[str, Any] = {}
        if self.gguf:
            more["quantization_config"] = transformers.GgufConfig(dequantize=True)
        names, options = self._names()
        try:
            with _reporting(progress):
                model, found = transformers.AutoModelForCausalLM.from_pretrained(
                    *names,
                    **options,
                    **more,
                    config=self.config,  # reading it anew takes as long as the weights do
                    dtype=dtype,
                    device_map={"": device},
                    attn_implementation="eager",
                    use_safetensors=True,
                    local_files_only=True,
                    ignore_mismatched_sizes=True,  # reported, and then refused in our words
                    output_loading_info=True,
                )
        except _FAULTS as error:
            raise self.fault(error) from error
        lacking = sorted(found["missing_keys"])
        lacking += sorted(name for name, *_ in found["mismatched_keys"])
        self.check_complete(lacking)
        progress(1.0)
        return model.eval()

    def check_complete(self, lacking: list[str]) -> None:
        """Raises ``ModelError`` if tensors of the architecture are not in the files."""
        if lacking:
            raise ModelError(
                f"model {self.where}: lacks {len(lacking)} of the tensors that"
                f" {self.config.model_type} needs, such as {lacking[0]}"
            )


def gguf_ends(metadata: dict[str, Any]) -> tuple[int, ...]:
    """Ids of the ends of sequence, turn and message, as far as the file names them."""
    keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(int(metadata[key]) for key in keys if key in metadata))


def _parts(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one."""
    if (folder / _INDEX).is_file():
        index = hf_folder.read_json(folder / _INDEX)
        parts = [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
    else:
        parts = [folder / _SINGLE]
    for part in parts:
        if not part.is_file():
            others = "; files of other formats are not read" if len(parts) == 1 else ""
            raise ModelError(f"model folder {folder}: has no {part.name}{others}")
    return parts


class _Bar:
    """Takes the place of a progress bar of the library."""

    def __init__(self, wrapped: Any, total: int | None, progress: Progress) -> None:
        self._wrapped = wrapped
        self._total = total or (len(wrapped) if hasattr(wrapped, "__len__") else 0)
        self._progress = progress
        self._done = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self._wrapped:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        """So many more are done. The last step, making the cache, is not the bar's."""
        self._done += count
        if self._total:
            self._progress(min(0.99, self._done / self._total))

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_args, **_more: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass


@contextmanager
def _reporting(progress: Progress) -> Iterator[None]:
    """Has the library's progress bars report to us, and nothing written to the terminal."""

    def hook(_factory: Any, args: Any, given: Any) -> _Bar:
        wrapped = args[0] if args else given.get("iterable", ())
        return _Bar(wrapped, given.get("total"), progress)

    before = transformers_logging.set_tqdm_hook(hook)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)
        transformers_logging.set_verbosity(level)


def count_bytes(model: Any) -> int:
    """Bytes of the weights; those that are used twice count once."""
    sizes = {one.data_ptr(): one.numel() * one.element_size() for one in model.parameters()}
    return sum(sizes.values())
