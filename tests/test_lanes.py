"""Packing completions into lanes: what lies where, in which shapes, how little is left empty."""

import numpy as np
import pytest

from srpo_jax.data.batching import Layout, choose_layout
from srpo_jax.learn import lanes
from srpo_jax.learn.lanes import LaneBudgets, pack, round_up, slots_and_tokens


def budgets_of(per_row, G, S, R, rows=1, updates=1, pair_cost=0.0):
    """Of full rows: every place has its sequence."""
    return LaneBudgets(Layout(per_row * rows, 1, rows, updates), G, S, R, pair_cost)


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


@pytest.mark.parametrize(("pair_cost", "blocks"), [(0.0, 1), (9.0, 2)])
def test_every_wanted_token_stands_in_one_lane_once(pair_cost, blocks):
    rng = np.random.default_rng(0)
    per_row, G, S, R, A, shards = 4, 3, 20, 90, 2, 2
    prompts = rng.integers(1, S + 1, shards * A * per_row)
    lengths = rng.integers(0, R + 1, (len(prompts), G))
    lengths[3] = 0  # a filler
    (packed,) = pack(prompts, lengths, budgets_of(per_row, G, S, R, A, pair_cost=pair_cost))
    seen = set()
    for part in packed:
        assert len(part.sample) == shards * blocks
        for x in range(len(part.sample)):
            row = x // blocks * A + int(part.row[x // blocks])
            samples = holdings(part.sample[x], part.sample_at[x])
            for s, tokens in samples.items():
                p = row * per_row + s // G
                assert tokens == list(range(lengths[p, s % G]))
                lane = np.flatnonzero((part.sample[x] == s).any(1))
                assert len(lane) == 1 and s // G in part.prompt[x]
                seen.add((p, s % G))
            for p, tokens in holdings(part.prompt[x], part.prompt_at[x]).items():
                assert tokens == list(range(prompts[row * per_row + p]))
                assert any(s // G == p for s in samples)
    assert seen == set(zip(*map(np.ndarray.tolist, np.nonzero(lengths)), strict=True))


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


def test_nothing_to_learn_from_makes_no_micro_batch():
    lengths = np.zeros((4, 2), int)
    lengths[2] = 3
    (packed,) = pack(np.full(4, 3), lengths, budgets_of(1, 2, 4, 8, rows=2))
    assert packed[0] is not None and packed[1] is None  # the second shard has one row to learn from
    assert packed[0].row.tolist() == [0, 0]
    assert pack(np.full(2, 3), lengths[:2], budgets_of(1, 2, 4, 8, rows=2)) == [[None, None]]


def test_processes_take_the_shapes_of_the_neediest():
    budgets = budgets_of(1, 4, 8, 64, rows=2)
    short, long = np.full((2, 4), 20), np.full((2, 4), 60)
    told = []

    def record(own):
        told.append(own)
        return own

    pack(np.full(2, 4), long, budgets, agree=record)
    together = lambda own: np.maximum(own, told[0])  # noqa: E731
    for lengths in (short, long):
        (parts,) = pack(np.full(2, 4), lengths, budgets, agree=together)
        assert [part.sample.shape for part in parts] == [(1, 4, 64)] * 2
    assert len(told) == 1


@pytest.mark.parametrize(
    ("name", "budgets", "mean", "prompt_tokens"),
    [
        ("paper", budgets_of(2, 8, 1024, 2048, 64, 8, pair_cost=6e-5), (870, 0.5), (300, 900)),
        ("half", budgets_of(2, 8, 64, 512, 2, pair_cost=1e-3), (220, 0.5), (20, 64)),
        ("quickstart", budgets_of(16, 8, 16, 36, 2, 2, pair_cost=1e-2), (32, 0.02), (15, 16)),
    ],
)
def test_little_is_padding(name, budgets, mean, prompt_tokens):
    rng, slots, tokens = np.random.default_rng(2), 0, 0
    for _ in range(4):
        count = budgets.layout.sequences
        lengths = lognormal(rng, (count, 8), *mean, budgets.completion_tokens)
        prompts = rng.integers(*prompt_tokens, count)
        one = slots_and_tokens(sum(pack(prompts, lengths, budgets), []))
        slots, tokens = slots + one[0], tokens + one[1]
    assert 1 - tokens / slots < 0.15, name


def test_a_pair_costs_more_in_a_narrow_model():
    from srpo_jax.model.sizes import size_config

    wide = lanes.pair_cost(size_config("7b").text)
    assert wide == pytest.approx(4 * 3584 / (3584 * (2 * (3584 + 512) + 3 * 18_944)))
    assert lanes.pair_cost(size_config("3b").text) > wide
