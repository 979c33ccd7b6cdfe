"""Models from the hub, with huggingface_hub's cache and progress bars."""

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

from deploy.models import PART, Model, ModelNotFound, pick, remark

LIST_DEADLINE_S = 10.0


def fetch(name: str, file: str | None, revision: str | None, *, gguf: bool) -> Model:
    """Downloads a model, or takes it from the cache. Raises ``ModelNotFound`` with one line.

    Of a repository of GGUF files one is picked; of others everything is taken.
    """
    try:
        if not gguf:
            return Model(Path(snapshot_download(name, revision=revision)), name)
        names = [entry for entry in _files(name, revision) if entry.endswith(".gguf")]
        picked = pick(names, file, f"{name} on the hub")
        paths = [hf_hub_download(name, part, revision=revision) for part in _parts(picked)]
        return Model(Path(paths[0]), name, remark(picked, names))
    except HFValidationError as error:
        raise ModelNotFound(f"{name} is neither a local file nor a hub id") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise ModelNotFound(
            f"{name} is no local file, and the model hub cannot be reached "
            "(check the network and HF_ENDPOINT, or give a local GGUF file)"
        ) from error
    except HfHubHTTPError as error:
        raise ModelNotFound(_refusal(name, error)) from error
    except OSError as error:
        raise ModelNotFound(f"downloading {name} failed: {error}") from error


def _files(name: str, revision: str | None) -> list[str]:
    """The files of a repository; those in the cache if the hub cannot be reached."""
    try:
        # Not list_repo_files, which asks an unreachable hub for 20 seconds.
        siblings = HfApi().model_info(name, revision=revision, timeout=LIST_DEADLINE_S).siblings
        return [entry.rfilename for entry in siblings or ()]
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:
        if not _is_transport(error):
            raise
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


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
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return f"the hub refused {name}: {first}"
