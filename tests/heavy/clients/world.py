"""What the tests of all clients share: the server's options, tools and schemas.

Nothing here imports the server's code: a client knows it by its ports alone.
"""

from pathlib import Path
from typing import Any

PYTHON = Path(__file__).resolve().parents[3] / ".venv" / "bin" / "python"
KEY = "rh-only-for-tests"
LIMIT = 1024
SERVER = ("--api-key", KEY, "--max-total-tokens", str(LIMIT), "--max-best-of", "4")
# Equal requests then differ by little more than rounding.
EXACT = ("--engine-option", "exact=1", "--threads", "1")
MODEL = (*SERVER, *EXACT, "--engine-option", "embeddings=1")
SCRIPT = (*SERVER, "--engine", "scripted")
# What a client may wait for an answer, in seconds: the machine may be busy.
PATIENCE_S = 60

QUESTION = "What is the capital of France?"
USER = [{"role": "user", "content": QUESTION}]
# The model's own template around the question, without a system message.
TEMPLATED = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
TEXTS = ("e\u0301\u200d🚂", "👩‍👩‍👧‍👦 🇫🇷", "שלום مرحبا", "नमस्ते", "日本語", "\U0010ffff")

# Every part has an end, so that any model comes to it however little it understands.
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["rain", "sun"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
PERSON_TOKENS = 120

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 16},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
ADD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
ABOUT = {"get_weather": "The weather in a city", "add": "Adds two numbers"}
SCHEMAS = {"get_weather": WEATHER, "add": ADD}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": name, "description": ABOUT[name], "parameters": schema},
    }
    for name, schema in SCHEMAS.items()
]
TOOL_TOKENS = 160
