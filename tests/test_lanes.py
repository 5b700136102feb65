"""Packing completions into lanes: what lies where, in which shapes, how little is left empty."""

import jax
import numpy as np
import pytest

from srpo_jax.data.batching import Layout, choose_layout
from srpo_jax.learn import lanes
from srpo_jax.learn.lanes import LaneBudgets, pack, round_up, slots_and_tokens


def budgets_of(per_row, G, S, R, rows=1, updates=1, pair_cost=0.0, spread=False):
    """Of full rows: every place has its sequence."""
    return LaneBudgets(Layout(per_row * rows, 1, rows, updates), G, S, R, pair_cost, spread)


def lognormal(rng, shape, mean, sigma, cap):
    """Lengths as sampling gives them: log-normal, cut off at the budget."""
    drawn = np.exp(rng.normal(np.log(mean) - sigma**2 / 2, sigma, shape))
    return np.clip(drawn, 1, cap).astype(int)


def holdings(which, at):
    """Item -> the tokens of it that stand in a block's slots, in order."""
    found = {}
    for item, token in zip(which.ravel().tolist(), at.ravel().tolist(), strict=True):
        if item >= 0:
            found.setdefault(item, []).append(token)
    return found


def taken(part, x, per_row, G, rows=1):
    """(prompt, sample of it) in the whole batch -> the tokens of it in block x, likewise prompts:
    where its tokens stand."""
    blocks = len(part.prompt) // len(part.row)

    def prompt(own):
        if part.pick is None:
            return (x // blocks * rows + int(part.row[x // blocks])) * per_row + own
        m, p = divmod(int(part.pick[x // blocks, own]), per_row)
        return (m * rows + int(part.row[m])) * per_row + p

    samples = holdings(part.sample[x], part.sample_at[x])
    prompts = holdings(part.prompt[x], part.prompt_at[x])
    return (
        {(prompt(s // G), s % G): tokens for s, tokens in samples.items()},
        {prompt(p): tokens for p, tokens in prompts.items()},
    )


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(("pair_cost", "blocks"), [(0.0, 1), (9.0, 2)])
def test_every_wanted_token_stands_in_one_lane_once(pair_cost, blocks, spread):
    rng = np.random.default_rng(0)
    per_row, G, S, R, A, shards = 4, 3, 20, 90, 2, 2
    prompts = rng.integers(1, S + 1, shards * A * per_row)
    lengths = rng.integers(0, R + 1, (len(prompts), G))
    lengths[3] = 0  # a filler
    budgets = budgets_of(per_row, G, S, R, A, pair_cost=pair_cost, spread=spread)
    (packed,) = pack(prompts, lengths, budgets)
    seen = []
    # Micro-batches that are dealt out anew may each be cut in their own way.
    assert spread or {len(part.sample) for part in packed} == {shards * blocks}
    for part in packed:
        for x in range(len(part.sample)):
            samples, regions = taken(part, x, per_row, G, A)
            assert {p for p, _ in samples} == set(regions)
            assert len(regions) <= budgets.places(len(part.sample) // shards)
            for (p, g), tokens in samples.items():
                assert tokens == list(range(lengths[p, g]))
            for s in set(part.sample[x].ravel().tolist()) - {-1}:
                assert (part.sample[x] == s).any(1).sum() == 1
            for p, tokens in regions.items():
                assert tokens == list(range(prompts[p]))
            seen += samples
    assert sorted(seen) == [*zip(*map(np.ndarray.tolist, np.nonzero(lengths)), strict=True)]


def test_completions_leave_full_shards_with_a_copy_of_their_prompt():
    """One prompt alone in its update, on four shards: each takes one of its four completions."""
    lengths = np.zeros((4, 4), int)
    lengths[2] = [30, 31, 32, 29]
    ((part,),) = pack(np.full(4, 5), lengths, budgets_of(1, 4, 8, 32, spread=True))
    held = [taken(part, x, 1, 4) for x in range(4)]
    assert [prompts for _, prompts in held] == [{2: [*range(5)]}] * 4
    assert sorted(s for samples, _ in held for s in samples) == [(2, g) for g in range(4)]
    assert part.sample.shape == (4, 1, 32)


def test_rows_meet_rows_with_about_as_much_work_inside_their_update():
    # Two shards of four rows; each prompt's single completion fills so many lanes' worth.
    sizes = [[4, 1, 2, 3], [1, 4, 3, 2]]
    lengths = np.array([[[32] * n + [0] * (4 - n) for n in shard] for shard in sizes])
    budgets = budgets_of(1, 4, 8, 32, rows=4, updates=2)
    packed = sum(pack(np.full(8, 5), lengths.reshape(8, 4), budgets), [])
    assert [part.row.tolist() for part in packed] == [[0, 1], [1, 0], [3, 2], [2, 3]]
    assert [part.sample.shape[1] for part in packed] == [4, 1, 3, 2]


def test_updates_that_share_rows_take_each_its_own_prompts():
    """Four prompts in two updates on eight shards: all stand in one row of every shard."""
    layout = choose_layout(4, shards=8, most=2, updates=2)
    budgets = LaneBudgets(layout, 2, 8, 32)
    update_P = layout.places()  # [0 0 1 1 -1 -1 -1 -1]
    lengths = np.full((8, 2), 20)
    lengths[1] = 0  # taught nothing
    first, second = pack(np.full(8, 3), lengths, budgets, update_P=update_P)
    for (part,), own in ((first, [0]), (second, [2, 3])):
        assert part.row.tolist() == [0] * 8
        assert np.flatnonzero((part.sample >= 0).any((1, 2))).tolist() == own
    with pytest.raises(ValueError, match="rows do not divide into updates / sharing chunks"):
        Layout(6, rows=3, updates=2)


def test_shapes_follow_the_answers_and_not_the_budget():
    rng = np.random.default_rng(1)
    prompts, lengths = np.full(4, 15), rng.integers(31, 34, (4, 8))
    shapes = []
    for budget in (36, 144, 288):
        ((part,),) = pack(prompts, lengths, budgets_of(4, 8, 16, budget, pair_cost=0.01))
        shapes.append((part.sample.size, part.prompt.size))
    assert shapes[0] == shapes[1] == shapes[2]
    ((part,),) = pack(prompts, np.full((4, 8), 288), budgets_of(4, 8, 16, 288))
    assert part.sample.size == 4 * 8 * 288  # never more than the padded arrays


def test_counts_of_lanes_lie_on_a_short_grid():
    counts = sorted({round_up(n) for n in range(1, 129)})
    assert counts[:10] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] and len(counts) == 40
    assert all(n <= round_up(n) <= n * 1.125 + 1 for n in range(1, 1000))
    lengths = np.full((1, 17), 30)
    ((part,),) = pack(np.array([4]), lengths, budgets_of(1, 17, 8, 32))
    assert part.sample.shape == (1, 17, 32)  # 18 on the grid, but there are 17 completions
    full = np.full((2, 17), 32)
    ((part,),) = pack(np.full(2, 8), full, budgets_of(1, 17, 8, 32, spread=True))
    assert part.sample.shape == (2, 17, 32) and part.prompt.shape == (2, 8)


def test_nothing_to_learn_from_makes_no_micro_batch():
    lengths = np.zeros((4, 2), int)
    lengths[2] = 3
    (packed,) = pack(np.full(4, 3), lengths, budgets_of(1, 2, 4, 8, rows=2))
    assert packed[0] is not None and packed[1] is None  # the second shard has one row to learn from
    assert packed[0].row.tolist() == [0, 0]
    assert pack(np.full(2, 3), lengths[:2], budgets_of(1, 2, 4, 8, rows=2)) == [[None, None]]


@pytest.mark.parametrize("spread", [False, True])
def test_processes_cut_the_same_lanes_and_take_their_own(spread):
    rng, G = np.random.default_rng(5), 3
    prompts, lengths = rng.integers(1, 9, 16), rng.integers(0, 65, (16, G))
    budgets = LaneBudgets(Layout(16, 4, 2, 2), G, 8, 64, 1e-3, spread)
    update_P = np.concatenate([budgets.layout.places(z, 4) for z in range(4)])
    whole = pack(prompts, lengths, budgets, update_P=update_P)
    table = np.column_stack([prompts, update_P, lengths]).astype(np.int32)
    halves = [
        pack(
            *(x[half] for x in (prompts, lengths)),
            budgets,
            update_P=update_P[half],
            everyone=lambda own: table,
            place=(i, 2),
        )
        for i, half in enumerate((slice(0, 8), slice(8, 16)))
    ]
    for parts in zip(sum(whole, []), *(sum(half, []) for half in halves), strict=True):
        one, *others = (jax.tree.leaves(part) for part in parts)
        joined = [np.concatenate(pair) for pair in zip(*others, strict=True)]
        assert all(map(np.array_equal, one, joined))


PAPER = (870, 0.6), (300, 900)


@pytest.mark.parametrize(
    ("name", "shards", "budgets", "lengths", "prompt_tokens"),
    [
        ("paper", 1, budgets_of(2, 8, 1664, 2048, 64, 8, 6e-5), *PAPER),
        ("eight", 8, budgets_of(2, 8, 1664, 2048, 8, 8, 6e-5, spread=True), *PAPER),
        ("half", 1, budgets_of(2, 8, 64, 512, 2, 1, 1e-3), (220, 0.5), (20, 64)),
        ("quickstart", 1, budgets_of(16, 8, 16, 36, 2, 2, 2.8e-3), (29.7, 0.03), (15, 16)),
        ("long budget", 1, budgets_of(16, 8, 16, 288, 2, 2, 2.8e-3), (29.7, 0.03), (15, 16)),
    ],
)
def test_little_is_padding(name, shards, budgets, lengths, prompt_tokens):
    rng, slots, tokens = np.random.default_rng(2), 0, 0
    for _ in range(4):
        count = budgets.layout.sequences * shards
        drawn = lognormal(rng, (count, 8), *lengths, budgets.completion_tokens)
        prompts = rng.integers(*prompt_tokens, count)
        one = slots_and_tokens(sum(pack(prompts, drawn, budgets), []))
        # A second copy of a prompt is work that nobody asked for.
        slots, tokens = slots + one[0], tokens + drawn.sum() + prompts.sum()
    assert 1 - tokens / slots < 0.15, name


def test_lanes_take_no_more_memory_than_the_padded_arrays():
    """Lanes longer than the budget look at more pairs: only where others are saved."""
    budgets = budgets_of(2, 8, 1664, 2048, pair_cost=0.0, spread=True)
    full = 3328**2 + 16 * 2048 * (3328 + 2048)
    for mean in (300, 900, 1800):
        lengths = lognormal(np.random.default_rng(4), (16, 8), mean, 0.6, 2048)
        ((part,),) = pack(np.full(16, 800), lengths, budgets)
        U, (_, C, T) = part.prompt.shape[1], part.sample.shape
        assert U**2 + C * T * (U + T) <= full and U + C * T <= 3328 + 16 * 2048


def test_a_pair_costs_more_in_a_narrow_model():
    from srpo_jax.model.sizes import size_config

    wide = lanes.pair_cost(size_config("7b").text)
    assert wide == pytest.approx(4 * 3584 / (3584 * (2 * (3584 + 512) + 3 * 18_944)))
    assert lanes.pair_cost(size_config("3b").text) > wide
