"""What the pages tell a person to type, and where they send a reader, is there."""

import re
import shlex
from pathlib import Path

import click
import pytest

from tests.operations.commands import read
from tests.tidy import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(?:console)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
# With a prompt, which may name the machine, and with variables before the command.
COMMAND = re.compile(r"^(?:\w*\$ )?((?:[A-Z_]+=\S+ )*roundhouse (?:.*\\\n)*.*)$", re.MULTILINE)
# What is said of a command beside it.
REMARK = re.compile(r" {2,}(?=[^-\s])| #")


def commands_of(text: str) -> list[str]:
    """The command lines of ``roundhouse`` in a page's blocks of code."""
    lines = (line for block in BLOCK.findall(text) for line in COMMAND.findall(block))
    return [REMARK.split(line.replace("\\\n", ""))[0] for line in lines]


COMMANDS = [line for page in PAGES for line in commands_of(page.read_text())]


def understand(line: str) -> None:
    words = shlex.split(line)
    variables = dict[str, str]()
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    read(words[1:], variables)


def test_there_are_command_lines() -> None:
    assert len(COMMANDS) >= 30
    assert {line.split("roundhouse ")[1].split()[0] for line in COMMANDS} >= {
        *("serve", "router", "worker", "gateway", "groups", "switch", "engines", "tune"),
    }


@pytest.mark.parametrize("line", dict.fromkeys(COMMANDS))
def test_a_command_line_is_understood(line: str) -> None:
    understand(line)


@pytest.mark.parametrize("line", ["roundhouse serve --no-such 1", "NUM_SHARD=x roundhouse serve"])
def test_one_that_is_not_is_noticed(line: str) -> None:
    (found,) = commands_of(f"```console\n$ {line}    # serves\n```\n")
    with pytest.raises(click.UsageError):
        understand(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_verb_of_make_is_there(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    verbs = set(re.findall(r"^([a-z-]+)(?: [a-z -]+)?:", makefile, re.MULTILINE))
    named = re.findall(r"(?:`|\$ |^)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    assert {verb for verb in named if not verb.endswith("-")} <= verbs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / name if name else page
        assert target.exists(), link
        heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(_anchor_of, heads), link


def _anchor_of(head: str) -> str:
    return re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
