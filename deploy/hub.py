"""Models from the hub, with huggingface_hub's cache and progress bars."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from deploy.models import (
    PART,
    Model,
    ModelNotFound,
    is_hf,
    lacking,
    pick,
    reads_gguf_only,
    remark,
)
from deploy.patience import patience

LIST_DEADLINE_S = 10.0
# Weights, configuration, and the tokenizer and chat template in whatever form they come.
HF_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]


def fetch(name: str, engine: str, file: str | None, revision: str | None) -> Model:
    """Downloads what the engine needs, or takes it from the cache.

    That is a folder of safetensors with its configuration and tokenizer, or else one GGUF file.
    Raises ``ModelNotFound`` with one line.
    """
    with _told(name):
        names = _files(name, revision)
        if file is None and not reads_gguf_only(engine) and is_hf(names):
            wanted = [entry for entry in names if _is_hf_part(entry, names)]
            folder = snapshot_download(name, revision=revision, allow_patterns=wanted)
            return Model(Path(folder), name)
        ggufs = [entry for entry in names if entry.endswith(".gguf")]
        picked = pick(ggufs, file, f"{name} on the hub", lacking(engine, names))
        paths = [hf_hub_download(name, part, revision=revision) for part in _parts(picked)]
        return Model(Path(paths[0]), name, remark(picked, ggufs))


def fetch_adapter(name: str, revision: str | None, *, gguf: bool) -> Path:
    """Downloads a LoRA adapter: its GGUF file, or its folder. Raises ``ModelNotFound``."""
    with _told(name):
        if gguf:
            names = [entry for entry in _files(name, revision) if entry.endswith(".gguf")]
            none = "holds no GGUF file, and llama.cpp needs an adapter as GGUF"
            picked = pick(names, None, f"{name} on the hub", none)
            return Path(hf_hub_download(name, picked, revision=revision))
        return Path(snapshot_download(name, revision=revision, allow_patterns=ADAPTER_FILES))


def _is_hf_part(entry: str, names: Sequence[str]) -> bool:
    """Whether a file of a repository is needed to load the model.

    Folders hold the same weights for other programs, and so does ``consolidated.safetensors``
    where there are weights by the usual names.
    """
    if "/" in entry or not entry.endswith(HF_FILES):
        return False
    usual = any(name.startswith("model") and name.endswith(".safetensors") for name in names)
    return not (usual and entry.startswith("consolidated") and entry.endswith(".safetensors"))


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Makes one ``ModelNotFound`` of whatever goes wrong while ``name`` is downloaded."""
    try:
        yield
    except HFValidationError as error:
        raise ModelNotFound(f"{name} is neither a local file nor a hub id") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise ModelNotFound(
            f"{name} is no local file, and the model hub cannot be reached "
            "(check the network and HF_ENDPOINT, or give a local file or folder)"
        ) from error
    except HfHubHTTPError as error:
        raise ModelNotFound(_refusal(name, error)) from error
    except OSError as error:
        where = "HF_HOME names the folder that models are kept in"
        raise ModelNotFound(f"downloading {name} failed: {_first_line(error)} ({where})") from error
    except Exception as error:
        if not (_is_transport(error) or type(error) is RuntimeError):  # which is hf_xet's only one
            raise
        on = "start it again, and the download goes on"
        raise ModelNotFound(f"downloading {name} failed: {_first_line(error)}; {on}") from error


def _files(name: str, revision: str | None) -> list[str]:
    """The files of a repository; those in the cache if the hub cannot be reached."""
    try:
        with patience(f"asking the model hub for {name} ...") if _seen() else nullcontext():
            # Not list_repo_files, which asks an unreachable hub for 20 seconds.
            siblings = HfApi().model_info(name, revision=revision, timeout=LIST_DEADLINE_S).siblings
        return [entry.rfilename for entry in siblings or ()]
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:
        if not _is_transport(error):
            raise
        # No patterns: of what is in the cache nothing is missing, though it is not all there is.
        folder = Path(
            snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[])
        )
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _seen() -> bool:
    """Whether somebody looks on: the log of a server that downloads is no place for it."""
    return sys.stderr.isatty()


def _is_transport(error: Exception) -> bool:
    """Whether the hub could not be reached: requests, httpx and httpx2 have no common class."""
    names = {kind.__name__ for kind in type(error).__mro__}
    offline = isinstance(error, ConnectionError | OfflineModeIsEnabled)
    return offline or bool(names & {"TransportError", "RequestException"})


def _parts(first: str) -> list[str]:
    """All files of a model that is split over several, by the name of the first."""
    found = PART.search(first)
    if found is None:
        return [first]
    stem, count = first[: found.start()], int(found[2])
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def _refusal(name: str, error: HfHubHTTPError) -> str:
    """The line for what the hub answered."""
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its terms on the hub, then log in with 'hf auth login'"
    if isinstance(error, RepositoryNotFoundError):
        return f"{name} is neither a local file nor a model on the hub (private ones need a login)"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no such revision"
    return f"the hub refused {name}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    """What an error says first: behind that, libraries advise the programmer."""
    return next(iter(str(error).splitlines()), type(error).__name__)
