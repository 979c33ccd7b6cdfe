"""Several groups under one model name: which may, and whose tokenizer counts."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, normalizers

from router.config import GroupSpec, Settings
from router.fleet import Fleet, GroupCard, MismatchError
from router.text.agreement import PROBES, difference
from router.text.tokenizer import Tokenizer
from tests.service.test_group_fleet import card
from tests.service.vocabularies import EXACT, byte_level, byte_level_with_bos

SPECS = [GroupSpec(name, None, (f"unix:///{name}",)) for name in "ghi"]


def copy() -> tokenizers.Tokenizer:
    """The same vocabulary in an object of its own."""
    return tokenizers.Tokenizer.from_str(byte_level().to_str())


def rewritten() -> Tokenizer:
    """Files that differ, and mean the same: with a token more at the end, as padding."""
    made = copy()
    made.add_special_tokens([AddedToken("[PAD]", special=True)])
    return Tokenizer(made)


def renamed() -> Tokenizer:
    """One token stands for something else."""
    text = byte_level().to_str()
    assert '"<tool>"' in text
    return Tokenizer(tokenizers.Tokenizer.from_str(text.replace('"<tool>"', '"<fool>"')))


def lower_case() -> Tokenizer:
    """All tokens are the same, but capitals are lost."""
    made = copy()
    made.normalizer = normalizers.Lowercase()
    return Tokenizer(made)


@contextmanager
def serving(fleet: Fleet, one: GroupCard, tokenizer: Tokenizer) -> Iterator[None]:
    with fleet.claim(one):
        asyncio.run(fleet.agree(one, tokenizer))
        fleet.up(one, tokenizer)
        yield


@pytest.mark.parametrize("make", EXACT, ids=lambda make: make.__name__)
def test_a_tokenizer_agrees_with_a_copy_of_itself(make: Any) -> None:
    other = tokenizers.Tokenizer.from_str(make().to_str())
    assert difference(Tokenizer(make()), Tokenizer(other)) == ""


def test_padding_and_what_is_put_before_a_prompt_are_no_difference() -> None:
    one = Tokenizer(copy())
    assert difference(one, rewritten()) == difference(rewritten(), one) == ""
    assert difference(one, Tokenizer(byte_level_with_bos())) == ""


def test_a_difference_is_named() -> None:
    one = Tokenizer(copy())
    told = difference(one, renamed())
    assert "'<tool>' in one and '<fool>' in the other" in told
    assert "cut 'The quick brown fox" in difference(one, lower_case())
    assert len({len(probe) for probe in PROBES}) > 5


def test_a_text_with_a_control_token_is_a_probe() -> None:
    """The probes know only a few control tokens by name; a model's own are tried as well."""
    one, other = copy(), copy()
    one.add_special_tokens([AddedToken("<|own|>", special=True, rstrip=True)])
    other.add_special_tokens([AddedToken("<|own|>", special=True)])
    assert "<|own|>" in difference(Tokenizer(one), Tokenizer(other))


def test_replicas_may_have_other_files_and_the_first_ones_count() -> None:
    fleet = Fleet(Settings(), SPECS)
    first, second = Tokenizer(copy()), rewritten()
    with serving(fleet, card("h", tokenizer_sha256="b"), second):
        assert fleet.model("m").tokenizer is second
        with serving(fleet, card("g", tokenizer_sha256="a"), first):
            assert fleet.model("m").tokenizer is first
            assert [group.name for group in fleet.model("m").groups] == ["g", "h"]


def test_an_answer_ends_at_what_any_replica_calls_an_end() -> None:
    fleet = Fleet(Settings(), SPECS)
    tokenizer = Tokenizer(copy())
    with (
        serving(fleet, card("g", eos_token_ids=[2, 1]), tokenizer),
        serving(fleet, card("h", eos_token_ids=[1, 0]), tokenizer),
    ):
        assert fleet.model("m").eos_token_ids == (2, 1, 0)


@pytest.mark.parametrize("make", [renamed, lower_case])
def test_a_replica_with_another_vocabulary_is_refused_by_name(make: Any) -> None:
    fleet = Fleet(Settings(), SPECS)
    with serving(fleet, card("g", tokenizer_sha256="a"), Tokenizer(copy())):
        refused = pytest.raises(MismatchError, match=r"group g serves m with another tokenizer \(")
        for _ in range(2):
            with refused, serving(fleet, card("h", tokenizer_sha256="b"), make()):
                pass
        assert fleet.groups_up() == {"g": True, "h": False, "i": False}
        with serving(fleet, card("h", tokenizer_sha256="b", model_id="n"), make()):
            pass  # under another name it is welcome
    with serving(fleet, card("g", tokenizer_sha256="b"), make()):
        pass  # the same group may come back with another model


def test_a_replica_of_another_size_is_refused_by_name() -> None:
    fleet = Fleet(Settings(), SPECS)
    with (
        serving(fleet, card("g"), Tokenizer(copy())),
        pytest.raises(
            MismatchError, match="group g serves m with 300 tokens, and this one has 301"
        ),
        fleet.claim(card("h", vocab_size=301)),
    ):
        pass


async def test_of_two_that_come_up_at_once_one_is_refused() -> None:
    fleet = Fleet(Settings(), SPECS)
    one, other = card("g", tokenizer_sha256="a"), card("h", tokenizer_sha256="b")
    third = card("i", tokenizer_sha256="c")
    with fleet.claim(one), fleet.claim(other), fleet.claim(third):
        ends = await asyncio.gather(
            fleet.agree(third, Tokenizer(copy())),
            fleet.agree(one, rewritten()),
            fleet.agree(other, renamed()),
            return_exceptions=True,
        )
    assert [type(end) for end in ends] == [type(None), type(None), MismatchError]
