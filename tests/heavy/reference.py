"""What ``transformers.generate`` answers in float32: writes ``smollm2.json`` and ``family.json``.

Engines without torch in their environment are compared with these files. To write them anew, where
torch and transformers are installed:

    python -m tests.heavy.reference            # or one: python -m tests.heavy.reference family

For each prompt they have its tokens, the tokens drawn greedily (the end of a text is a token like
any other), at each of them the margin between the two largest logits, and the first one's logprob.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.heavy.family import MEMBERS, member_folder
from tests.heavy.family import prompt as family_prompt

HERE = Path(__file__).parent
COUNT = 64
FAMILY_COUNT = 24
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


def answers(folder: Path, asked: list[list[int]], count: int) -> list[dict[str, Any]]:
    """Computes with torch."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
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
    from tokenizers import Tokenizer

    from tests.heavy.models import smollm2_folder

    folder = smollm2_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    asked = [tokenizer.encode(text, add_special_tokens=False).ids for text in prompts()]
    return answers(folder, asked, COUNT)


if __name__ == "__main__":
    for file, make in (("family", family), ("smollm2", smollm2)):
        if file in (sys.argv[1:] or ("family", "smollm2")):
            write(file, make())
