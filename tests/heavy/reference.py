"""What ``transformers.generate`` answers in float32: writes the ``.json`` files beside it.

Engines are compared with these files, as some have no torch in their environment, and as loading a
reference takes longer than answering. To write them anew, where torch and transformers are
installed:

    python -m tests.heavy.reference            # or one: python -m tests.heavy.reference family

For each prompt they have its tokens, the tokens drawn greedily (the end of a text is a token like
any other), at each of them the margin between the two largest logits, and the first one's logprob.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.heavy.family import MEMBERS, member_folder
from tests.heavy.family import prompt as family_prompt

HERE = Path(__file__).parent
COUNT = 64
FAMILY_COUNT = 24
GEMMA3_COUNT = 12
# Two logits that are nearer to each other may change places by rounding.
MARGIN = 1e-3
SUBJECTS = (
    "The railway came to the valley in the spring, and",
    "Water boils at a lower temperature on a mountain because",
    "Once upon a time there was a small engine that",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Question: What is the capital of France?\nAnswer:",
    "The three most important things in a kitchen are",
    "In 1815, after the battle,",
    "Dear Sir or Madam,\n\nI am writing to",
)
SHAPES = ("{}", "Continue this text. {}", "{} ", 'A teacher read aloud: "{}')


def prompts() -> list[str]:
    """32 texts of 6 to 30 tokens."""
    return [shape.format(subject) for shape in SHAPES for subject in SUBJECTS]


def read(name: str = "smollm2") -> list[dict[str, Any]]:
    """A file, one entry a prompt: ``prompt``, ``tokens``, ``margins``, ``logprob``.

    Those of the family also have the ``name`` of the model, see ``family.MEMBERS``.
    """
    found: list[dict[str, Any]] = json.loads((HERE / f"{name}.json").read_text())["answers"]
    return found


def agreed(tokens: list[int], entry: dict[str, Any], margin: float = MARGIN) -> int:
    """How many tokens are the reference's, until one differs where the margin allows it."""
    for place, (token, expected) in enumerate(zip(tokens, entry["tokens"], strict=False)):
        if token != expected:
            assert entry["margins"][place] < margin, f"token {place} differs by a clear margin"
            return place
    return len(tokens)


def gemma3_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """The last one is longer than the windows of 512 tokens that most layers have."""
    texts = ("The capital of France is", "Water boils at a lower temperature on a mountain")
    asked: list[list[int]] = [tokenizer.encode(text).ids for text in texts]
    return [*asked, (asked[1] * 60)[:600]]


def answers(
    folder: Path, asked: list[list[int]], count: int, **loading: Any
) -> list[dict[str, Any]]:
    """Computes with torch; ``loading`` are further arguments of ``from_pretrained``."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **loading
    )
    model.generation_config.eos_token_id = None
    found = []
    for tokens in asked:
        with torch.inference_mode():
            made = model.generate(
                torch.tensor([tokens]),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = torch.cat(made.logits)
        top = logits.topk(2).values
        drawn = made.sequences[0, len(tokens) :].tolist()
        margins = [round(margin, 5) for margin in (top[:, 0] - top[:, 1]).tolist()]
        first = logits[0].log_softmax(-1)[drawn[0]].item()
        found.append({"prompt": tokens, "tokens": drawn, "margins": margins, "logprob": first})
    return found


def write(name: str, entries: list[dict[str, Any]]) -> None:
    """Writes a file, one line an entry."""
    import torch
    import transformers

    about = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    text = f'{{"made_by": "{about}", "answers": [\n{lines}\n]}}\n'
    (HERE / f"{name}.json").write_text(text)


def family() -> list[dict[str, Any]]:
    """What each member of the family answers."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in MEMBERS:
            folder = member_folder(name, Path(scratch) / name)
            entries = answers(folder, [family_prompt()], FAMILY_COUNT)
            found += [{"name": name, **entry} for entry in entries]
    return found


def smollm2() -> list[dict[str, Any]]:
    """What SmolLM2 answers."""
    from tests.heavy.models import smollm2_folder

    folder = smollm2_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    asked = [tokenizer.encode(text, add_special_tokens=False).ids for text in prompts()]
    return answers(folder, asked, COUNT)


def gemma3() -> list[dict[str, Any]]:
    """What Gemma 3 answers, as the library's own reader of GGUF files gives it its weights."""
    import transformers

    from shards.gguf_file import read_metadata
    from shards.gguf_tokenizer import tokenizer_files
    from tests.heavy.models import gemma3_gguf

    path = gemma3_gguf()
    tokenizer = tokenizer_files(path, read_metadata(path))["tokenizer.json"]
    asked = gemma3_prompts(Tokenizer.from_str(tokenizer.decode()))
    plain = transformers.GgufConfig(dequantize=True)
    loading = {"gguf_file": path.name, "quantization_config": plain}
    return answers(path.parent, asked, GEMMA3_COUNT, **loading)


FILES = {"family": family, "smollm2": smollm2, "gemma3": gemma3}

if __name__ == "__main__":
    for file in sys.argv[1:] or FILES:
        write(file, FILES[file]())
