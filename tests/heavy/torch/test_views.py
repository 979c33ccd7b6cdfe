"""What a step looks like to the layers, checked against a plain account of who sees whom."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards.engines.base import Admit, Plan, SamplingParams
from shards.engines.torch_graphs import (
    DecodeGraphs,
    Packing,
    bucket,
    is_decode,
    run_directly,
)
from shards.engines.torch_views import (
    GROUP_CELLS,
    GROUPS_MAX,
    Kind,
    Viewer,
    causal_mask,
    groups,
    shared_prefixes,
)
from shards.kv import TRASH, StepLayout, lay_out
from tests.heavy.models import tiny_llama_folder
from tests.heavy.torch.made import make

PAGE = 4
KINDS = (Kind(), Kind(window=5))


def layout_of(sequences: list[tuple[int, int]]) -> StepLayout:
    """A step for sequences of (length in the end, tokens of it in this step), pages in order."""
    most = max(12, *(-(-length // PAGE) for length, _ in sequences))
    tables = np.full((len(sequences), most), TRASH, np.int32)
    page = 1
    for row, (length, _) in enumerate(sequences):
        count = -(-length // PAGE)
        tables[row, :count] = range(page, page + count)
        page += count
    starts = np.cumsum([0] + [count for _, count in sequences]).astype(np.int32)
    places = [np.arange(length - count, length, dtype=np.int32) for length, count in sequences]
    position = np.concatenate(places)
    owner = np.repeat(np.arange(len(sequences)), [count for _, count in sequences])
    return StepLayout(
        tokens=np.zeros(len(position), np.int32),
        positions=position,
        cells=tables[owner, position // PAGE] * np.int32(PAGE) + position % np.int32(PAGE),
        starts=starts,
        lengths=np.array([length for length, _ in sequences], np.int32),
        tables=tables,
        draws=starts[1:] - 1,
    )


def cells_seen(layout: StepLayout, kind: Kind) -> dict[int, set[int]]:
    """By token of the batch: the cells that its view lets it see."""
    view = Viewer(PAGE, torch.float32, torch.device("cpu"), masked=True).view(layout, kind)
    seen: dict[int, set[int]] = {}
    offsets = np.arange(PAGE)
    for decodes in view.decodes:
        rows = range(len(layout.tokens)) if decodes.rows is None else decodes.rows.tolist()
        pages = decodes.pages.numpy().reshape(decodes.count, -1)
        prefix = [] if decodes.prefix is None else decodes.prefix.tolist()
        for at, row in enumerate(rows):
            cells = (pages[at][:, None] * PAGE + offsets).reshape(-1)
            seen[row] = set(cells[decodes.mask[at, 0, 0].numpy() == 0].tolist())
            seen[row] |= {page * PAGE + offset for page in prefix for offset in offsets}
    for chunk in view.chunks:
        count = chunk.end - chunk.start
        if chunk.pages is None:  # its own keys in the batch, by their cells
            cells = layout.cells[chunk.start : chunk.end]
        else:
            cells = (chunk.pages.numpy()[:, None] * PAGE + offsets).reshape(-1)
        mask = chunk.mask
        if mask is None:
            mask = causal_mask(0, 0, count, count, Kind(), torch.zeros(()))
        for at in range(count):
            seen[chunk.start + at] = set(cells[mask[at].numpy() == 0].tolist())
    return seen


@given(st.data())
def test_each_token_sees_its_own_past_and_nothing_else(data: st.DataObject) -> None:
    lengths = st.integers(1, 40).flatmap(
        lambda length: st.tuples(st.just(length), st.integers(1, length) | st.just(1))
    )
    sequences = data.draw(st.lists(lengths, min_size=1, max_size=6))
    layout = layout_of(sequences)
    for kind in KINDS:
        seen = cells_seen(layout, kind)
        assert sorted(seen) == list(range(len(layout.tokens)))
        for row in range(len(sequences)):
            for token in range(layout.starts[row], layout.starts[row + 1]):
                position = int(layout.positions[token])
                first = max(0, position + 1 - kind.window) if kind.window else 0
                places = range(first, position + 1)
                expected = {
                    int(layout.tables[row, place // PAGE]) * PAGE + place % PAGE for place in places
                }
                assert seen[token] == expected


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=64))
def test_groups_hold_every_row_once_and_waste_little(widths: list[int]) -> None:
    array = np.array(widths)
    parts = list(groups(array, 16))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(widths)))
    assert len(parts) <= GROUPS_MAX
    padded = sum(len(part) * int(array[part].max()) for part in parts)
    assert padded <= len(widths) * max(widths)


def test_a_group_is_split_only_where_that_pays() -> None:
    long, short = 100, 4
    parts = [part.tolist() for part in groups(np.array([short, long, short, short]), 16)]
    assert parts == [[1], [0, 2, 3]]
    near = 100 - GROUP_CELLS // 16 // 3 + 1
    assert len(list(groups(np.array([100, near, near, near]), 16))) == 1


def tables_of(*rows: list[int]) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), TRASH, np.int32)
    for at, row in enumerate(rows):
        out[at, : len(row)] = row
    return out


def test_prefixes_are_found_in_groups() -> None:
    first, second = list(range(1, 41)), list(range(101, 171))
    tables = tables_of(
        [*first, 50], [*second, 51], [*first, 52, 53], [*second, 54], [*first, 55], [56]
    )
    found = {tuple(rows.tolist()): common for rows, common in shared_prefixes(tables, 16)}
    assert found == {(0, 2, 4): 40, (1, 3): 70}


def test_a_short_prefix_of_all_does_not_hide_a_long_one_of_some() -> None:
    long = list(range(1, 81))
    tables = tables_of([1, 90], [*long, 91], [1, 92], [*long, 93], [*long, 94])
    found = [(rows.tolist(), common) for rows, common in shared_prefixes(tables, 16)]
    assert found == [([1, 3, 4], 80)]


def test_what_spares_little_is_left_alone() -> None:
    assert shared_prefixes(tables_of([1, 2, 3], [1, 2, 4], [1, 5]), 16) == []
    assert shared_prefixes(tables_of([1]), 16) == []


@pytest.mark.parametrize("kind", KINDS)
def test_for_the_kernel_decodes_are_one_group_without_masks(kind: Kind) -> None:
    """Lengths that would be groups, and a prefix that would be shared: it follows each table."""
    layout = layout_of([(4 * GROUP_CELLS, 1), (9, 1), (3, 1)])
    view = Viewer(PAGE, torch.float32, torch.device("cpu"), masked=False).view(layout, kind)
    (decodes,) = view.decodes
    assert (decodes.rows, decodes.count, decodes.mask, decodes.prefix) == (None, 3, None, None)
    assert decodes.lengths.tolist() == [4 * GROUP_CELLS, 9, 3]
    first = [
        max(0, length - kind.window) // PAGE if kind.window else 0
        for length in (4 * GROUP_CELLS, 9, 3)
    ]
    assert decodes.begins.tolist() == [page * PAGE for page in first]
    width = decodes.pages.numel() // 3
    for row, page in enumerate(decodes.pages.view(3, width)[:, 0].tolist()):
        assert page == layout.tables[row, first[row]]


# Decode steps in buckets ------------------------------------------------------------------------


def test_buckets_are_powers_of_two_up_to_the_most() -> None:
    assert [bucket(count, 1, 48) for count in (1, 2, 3, 17, 33, 48)] == [1, 2, 4, 32, 48, 48]
    assert [bucket(count, 16, 500) for count in (1, 16, 17, 400)] == [16, 16, 32, 500]


@pytest.mark.parametrize("window", [0, 16])
def test_a_padded_step_computes_what_the_plain_one_does(window: int) -> None:
    """What a graph would replay, run as it is: padded rows and pages change nothing."""
    changes = {}
    if window:
        changes = {"architectures": ["MistralForCausalLM"], "sliding_window": window}
        changes["model_type"] = "mistral"
    engine = make(tiny_llama_folder(**changes))
    model, captured = engine._model, []

    def capture(packed: np.ndarray, compute: object) -> object:
        captured.append(packed.shape)
        return run_directly(packed, compute)

    packing = Packing(model.kinds, 16, torch.float32, engine._late, masked=True)
    graphs = DecodeGraphs(model, packing, 8, 64, capture)
    for number in (1, 2, 3):
        tokens = list(range(3, 3 + 15 * number))
        made = Admit(number, tokens, len(tokens), SamplingParams())
        engine.step(Plan(admits=[made], work=[(number, len(tokens))]))
    residents = list(engine._residents.by_sequence.values())
    for _ in range(2):
        layout = lay_out(engine._tables, [(one, 1) for one in residents], residents)
        assert is_decode(layout)
        padded = graphs.logits(layout)
        plain = engine._logits(layout)
        assert padded.shape == plain.shape
        assert torch.allclose(padded, plain, atol=1e-4)
        engine.step(Plan(work=[(one.sequence, 1) for one in residents]))
    # Three rows are padded to four, and one capture serves both steps.
    assert [rows for rows, _ in captured] == [4]
    graphs.warm()
    assert [rows for rows, _ in captured] == [4, 8, 2, 1], "what is there is not captured again"
    assert len({width for _, width in captured}) == 1
    half = lay_out(engine._tables, [(one, 1) for one in residents], residents[:2])
    assert not is_decode(half)
    # As many rows as tokens, but one of them is of a prompt.
    assert not is_decode(replace(half, scores=np.array([2], np.int32)))
    engine.close()
