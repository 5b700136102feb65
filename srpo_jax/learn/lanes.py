"""Where completions lie in the passes of an update: packed into lanes, on the host, in numpy.

A pass costs what its slots cost, whether tokens stand in them or not. So the completions of a row
are laid one behind the other into lanes, longest first, each into the first lane with room for it
(first-fit decreasing). Shapes come from short lists, because each of them is a program of its own;
all data shards run the same program at the same time, so each shard's rows are ordered by their
work, and the shapes are what the neediest shard needs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np

from srpo_jax.data.batching import Layout
from srpo_jax.model.config import TextConfig
from srpo_jax.structs import Lanes

SHORTEST_LANE = 32  # slots; below this, programs multiply and nothing is saved
TOO_LONG = 2**30  # lanes that a cut would need whose lanes are shorter than a completion


@dataclasses.dataclass(frozen=True)
class LaneBudgets:
    """What a rollout may hold at most, and what weighs one way of cutting rows against another."""

    layout: Layout  # of the batch
    group: int
    prompt_tokens: int
    completion_tokens: int
    pair_cost: float = 0.0  # of a query and a key, in units of what a token costs by itself

    @property
    def lane_slots(self) -> list[int]:
        """Lengths that lanes may have: the budget, half of it, a quarter of it, ..."""
        slots = [self.completion_tokens]
        while math.ceil(slots[0] / 2) >= SHORTEST_LANE:
            slots.insert(0, math.ceil(slots[0] / 2))
        return slots

    @property
    def block_counts(self) -> list[int]:
        """Into how many blocks a row may be cut."""
        return [n for n in range(1, self.layout.per_row + 1) if self.layout.per_row % n == 0]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How rows are cut up: the same for a whole rollout."""

    blocks: int  # of a row
    slots: int  # of a lane


@dataclasses.dataclass(frozen=True)
class Shape:
    """Budgets of a micro-batch: what its programs are compiled for, and what a pass costs."""

    cut: Cut
    region: int  # slots of a block's prompts
    lanes: int  # of a block

    def cost(self, pair_cost: float) -> float:
        """Of a row, in units of what a token costs by itself."""
        own, slots = self.lanes * self.cut.slots, self.cut.slots
        pairs = self.region**2 + own * (self.region + slots)
        return self.cut.blocks * (self.region + own + pair_cost * pairs) if own else 0.0


@dataclasses.dataclass(frozen=True)
class Block:
    """Prompts of a row, and their completions (prompt * G + g) lane by lane."""

    prompts: list[int]
    lanes: list[list[int]]


def pair_cost(text: TextConfig) -> float:
    """Cost of a query and a key, softmax included, in units of a token's matrix products."""
    heads = text.num_attention_heads * text.head_dim
    key_values = text.num_key_value_heads * text.head_dim
    matrices = 2 * text.hidden_size * (heads + key_values)
    matrices += 3 * text.hidden_size * text.intermediate_size
    return 2 * (2 * heads) / matrices  # twice: the softmax takes about as long as the products


def pack(
    prompt_lengths_P: np.ndarray,
    lengths_PG: np.ndarray,
    budgets: LaneBudgets,
    *,
    update_P: np.ndarray | None = None,
    agree: Callable[[np.ndarray], np.ndarray] = lambda own: own,
) -> list[list[Lanes[np.ndarray] | None]]:
    """The lanes of each update's micro-batches, for this process's rows; None where no shard has a
    completion.

    A micro-batch takes one row of each shard; rows change places inside their update only.

    Args:
        prompt_lengths_P: tokens of each prompt.
        lengths_PG: tokens of each completion; 0: it is left out (and a prompt without any, too).
        budgets: rows are stored shard after shard, ``layout.rows`` of each.
        update_P: which update takes each prompt; None: all in its rows.
        agree: elementwise maximum over all processes of an int array (collective, called once).
    """
    row_V, prompts_MVP, lengths_MVPG = _by_update(prompt_lengths_P, lengths_PG, budgets, update_P)
    cuts = [Cut(n, slots) for n in budgets.block_counts for slots in budgets.lane_slots]
    fits = [
        [
            [fit_row(*row, cut) for row in zip(*shard, strict=True)]
            for shard in zip(prompts_MVP, lengths_MVPG, strict=True)
        ]
        if lengths_MVPG.max(initial=0) <= cut.slots
        else None
        for cut in cuts
    ]
    needs = agree(np.stack([_needs(rows, prompts_MVP, budgets) for rows in fits]))
    shapes = [_shapes(*pair, budgets) for pair in zip(cuts, needs, strict=True)]
    costs = [sum(shape.cost(budgets.pair_cost) for shape in each) for each in shapes]
    best = int(np.argmin(costs))
    rows = fits[best]
    assert rows is not None, "the budget itself holds every completion"
    order_MV, packed = _order(rows, budgets), []
    for i, shape in enumerate(shapes[best]):
        places = [(m, int(v)) for m, v in enumerate(order_MV[:, i])]
        blocks = [(rows[m][v], prompts_MVP[m, v], lengths_MVPG[m, v]) for m, v in places]
        packed.append(_arrays(row_V[order_MV[:, i]], blocks, shape) if shape.lanes else None)
    size = len(packed) // budgets.layout.updates
    return [packed[k * size : (k + 1) * size] for k in range(budgets.layout.updates)]


def _by_update(
    prompt_lengths_P: np.ndarray,
    lengths_PG: np.ndarray,
    budgets: LaneBudgets,
    update_P: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[V] the rows of all updates, one update after the other, and what each shard has in them:
    lengths of prompts [M, V, P] and of those completions that are the update's own [M, V, P, G]."""
    row_V = np.concatenate([budgets.layout.rows_of(k) for k in range(budgets.layout.updates)])
    shape = (-1, budgets.layout.rows, budgets.layout.per_row)
    prompts_MVP = np.asarray(prompt_lengths_P).reshape(shape)[:, row_V]
    lengths_MVPG = np.asarray(lengths_PG).reshape(*shape, budgets.group)[:, row_V]
    if update_P is not None:
        of_V = np.repeat(np.arange(budgets.layout.updates), len(row_V) // budgets.layout.updates)
        own_MVP = np.asarray(update_P).reshape(shape)[:, row_V] == of_V[None, :, None]
        lengths_MVPG = lengths_MVPG * own_MVP[..., None]
    return row_V, prompts_MVP, lengths_MVPG


def fit_row(prompt_lengths_P: np.ndarray, lengths_PG: np.ndarray, cut: Cut) -> list[Block]:
    """Blocks of one row: its prompts evened out by their completions' tokens, lanes first-fit."""
    tokens_P = lengths_PG.sum(1)
    members: list[list[int]] = [[] for _ in range(cut.blocks)]
    loads, most = [0] * cut.blocks, len(tokens_P) // cut.blocks
    for p in np.argsort(-tokens_P, kind="stable").tolist():
        b = min((b for b in range(cut.blocks) if len(members[b]) < most), key=loads.__getitem__)
        members[b].append(p)
        loads[b] += tokens_P[p]
    return [
        Block([p for p in sorted(prompts) if tokens_P[p]], _lanes(prompts, lengths_PG, cut.slots))
        for prompts in members
    ]


def _lanes(prompts: list[int], lengths_PG: np.ndarray, slots: int) -> list[list[int]]:
    """First-fit decreasing of the completions of some prompts."""
    G = lengths_PG.shape[1]
    samples = np.concatenate([p * G + np.arange(G) for p in sorted(prompts)])
    lengths = lengths_PG.reshape(-1)[samples]
    lanes: list[list[int]] = []
    room = np.full(len(samples), slots)
    for i in np.argsort(-lengths, kind="stable"):
        if lengths[i]:
            lane = int(np.argmax(room >= lengths[i]))
            lanes += [[]] if lane == len(lanes) else []
            lanes[lane].append(int(samples[i]))
            room[lane] -= lengths[i]
    return lanes


Rows = list[list[list[Block]]]  # of each shard, of each row that it takes, the blocks


def _needs(rows: Rows | None, prompts_MVP: np.ndarray, budgets: LaneBudgets) -> np.ndarray:
    """[1 + V]: slots of a region, then the lanes of each micro-batch, rows in order."""
    if rows is None:
        return np.full(1 + prompts_MVP.shape[1], TOO_LONG)
    regions = [
        int(lengths_P[block.prompts].sum())
        for shard, lengths_VP in zip(rows, prompts_MVP, strict=True)
        for row, lengths_P in zip(shard, lengths_VP, strict=True)
        for block in row
    ]
    ordered = np.take_along_axis(_counts(rows), _order(rows, budgets), axis=1)
    return np.array([max(regions), *ordered.max(0)])


def _counts(rows: Rows) -> np.ndarray:
    """[M, V] lanes that each row wants of each of its blocks."""
    return np.array([[max(len(block.lanes) for block in row) for row in shard] for shard in rows])


def _order(rows: Rows, budgets: LaneBudgets) -> np.ndarray:
    """[M, V]: which of its rows a shard gives to each micro-batch: by work, inside each update."""
    counts_MV = _counts(rows)
    counts_MUA = counts_MV.reshape(len(rows), budgets.layout.updates, -1)
    start_U1 = np.arange(budgets.layout.updates)[:, None] * counts_MUA.shape[-1]
    return (np.argsort(-counts_MUA, axis=-1, kind="stable") + start_U1).reshape(counts_MV.shape)


def _shapes(cut: Cut, needs: np.ndarray, budgets: LaneBudgets) -> list[Shape]:
    """Of each micro-batch, rounded up to the grids."""
    if needs[0] >= TOO_LONG:
        return [Shape(cut, TOO_LONG, 1)]
    per_block = budgets.layout.per_row // cut.blocks
    unit = math.ceil(budgets.prompt_tokens / 8)
    region = unit * round_up(math.ceil(needs[0] / unit))
    region = min(region, per_block * budgets.prompt_tokens)
    lanes = [min(round_up(int(n)), per_block * budgets.group) for n in needs[1:]]
    return [Shape(cut, region, n) for n in lanes]


def round_up(n: int) -> int:
    """``n`` up to 8, above that the next number on a grid with steps of about an eighth."""
    step = 2 ** max(0, n.bit_length() - 4)
    return -(-n // step) * step


def _arrays(
    row_M: np.ndarray,
    rows: list[tuple[list[Block], np.ndarray, np.ndarray]],
    shape: Shape,
) -> Lanes[np.ndarray]:
    """Index arrays from (blocks, lengths of prompts, lengths of completions) of each row."""
    blocks = [(block, *lengths) for row, *lengths in rows for block in row]
    prompt, prompt_at = (np.full((len(blocks), shape.region), n, np.int32) for n in (-1, 0))
    size = (len(blocks), shape.lanes, shape.cut.slots)
    sample, sample_at = (np.full(size, n, np.int32) for n in (-1, 0))
    for x, (block, prompt_lengths, lengths) in enumerate(blocks):
        _fill(prompt[x], prompt_at[x], block.prompts, prompt_lengths)
        for c, lane in enumerate(block.lanes):
            _fill(sample[x, c], sample_at[x, c], lane, lengths.ravel())
    return Lanes(row_M.astype(np.int32), prompt, prompt_at, sample, sample_at)


def _fill(which: np.ndarray, at: np.ndarray, items: list[int], lengths: np.ndarray) -> None:
    """Lays ``items`` one behind the other."""
    start = 0
    for item in items:
        end = start + int(lengths[item])
        which[start:end], at[start:end] = item, np.arange(end - start)
        start = end


def slots_and_tokens(packed: Iterable[Lanes[np.ndarray] | None]) -> tuple[int, int]:
    """Slots that a pass over these rows computes, and the tokens that stand in them."""
    arrays = [x for lanes in packed if lanes for x in (lanes.prompt, lanes.sample)]
    return sum(x.size for x in arrays), sum(int((x >= 0).sum()) for x in arrays)
