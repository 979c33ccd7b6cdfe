"""Every field of Anthropic's SDK has a row in docs/anthropic-compatibility.md."""

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

from anthropic.types import (
    OutputConfigParam,
    ThinkingConfigParam,
    ToolParam,
    message_count_tokens_params,
    message_create_params,
)

PAGE = Path(__file__).parents[3] / "docs" / "anthropic-compatibility.md"


def rows() -> set[str]:
    lines = re.findall(r"^\| (`.+?`) \| [a-z ]+ \|", PAGE.read_text(), re.MULTILINE)
    return {name for line in lines for name in re.findall(r"`([\w.]+)`", line)}


def within(prefix: str, hint: Any) -> set[str]:
    """The fields of a typed dictionary of the SDK, or of several."""
    parts = get_args(hint) or (hint,)
    return {f"{prefix}{name}" for part in parts for name in get_type_hints(part)}


def test_every_field_of_the_sdk_has_a_row() -> None:
    known = within("", message_create_params.MessageCreateParamsNonStreaming)
    known |= within("", message_count_tokens_params.MessageCountTokensParams)
    known |= within("thinking.", ThinkingConfigParam) | within("output_config.", OutputConfigParam)
    known |= within("tools.", ToolParam) - {"tools.cache_control"}
    assert len(known) > 20
    assert known - {"thinking", "output_config"} - rows() == set()
