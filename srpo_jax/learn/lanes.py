"""Where completions lie in the passes of an update: packed into lanes, on the host, in numpy.

A pass costs what its slots cost, whether tokens stand in them or not. So the completions of a row
are laid one behind the other into lanes, longest first, each into the first lane with room for it
(first-fit decreasing). Samples with one first round may be laid down as one family: that round
once, then what each adds. Shapes come from short lists, because each of them is a program of its
own.

All data shards run the same program at the same time, so a micro-batch costs what its neediest
shard needs. Each shard's rows are therefore ordered by their work, and, where the budgets allow it
(``spread``), the completions of a micro-batch are dealt out anew to its shards: whole prompts, or
single completions with a copy of their prompt.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from srpo_jax.data.batching import Layout
from srpo_jax.model.config import TextConfig
from srpo_jax.structs import Lanes

SHORTEST_LANE = 32  # slots; below this, programs multiply and nothing is saved
LONGEST_LANE = 8  # times the longest completion


@dataclasses.dataclass(frozen=True)
class LaneBudgets:
    """What a rollout may hold at most, and what weighs one way of cutting rows against another."""

    layout: Layout  # of the batch
    group: int  # completions of a prompt, or families of them
    prompt_tokens: int
    completion_tokens: int  # of each of these
    pair_cost: float = 0.0  # of a query and a key, in units of what a token costs by itself
    spread: bool = False  # completions may change shards inside their micro-batch

    def of_families(self, forks: int) -> "LaneBudgets":
        """The same for families of so many completions."""
        tokens = self.completion_tokens * forks
        return dataclasses.replace(self, group=self.group // forks, completion_tokens=tokens)

    def lane_slots(self, longest: int) -> list[int]:
        """Lengths that lanes of completions of at most ``longest`` tokens may have: just that; the
        budget, half as much again, and halves and doubles of both."""
        least = max(longest, SHORTEST_LANE)
        found, most = [round_up(least, parts=8)], LONGEST_LANE * least
        for slots in (self.completion_tokens, math.ceil(1.5 * self.completion_tokens)):
            while slots * 2 <= most:
                slots *= 2
            while slots >= least:
                found.append(slots)
                slots = math.ceil(slots / 2)
        return sorted({min(self.completion_tokens, found[0]), *found[1:]})

    @property
    def block_counts(self) -> list[int]:
        """Into how many blocks a row may be cut."""
        return [n for n in range(1, self.layout.per_row + 1) if self.layout.per_row % n == 0]

    def places(self, blocks: int) -> int:
        """Prompts of a block at most, one of which may be there for some of its completions."""
        return self.layout.per_row // blocks + self.spread

    def holds(self, shape: "Shape") -> bool:
        """Whether a pass takes no more memory than one over completions that fill their budget."""
        row = self.layout.per_row
        full = Shape(Cut(1, self.completion_tokens), row * self.prompt_tokens, row * self.group)
        return shape.pairs <= full.pairs and shape.cost(0) <= full.cost(0)


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

    @property
    def pairs(self) -> int:
        """Queries and keys of a row that are looked at."""
        own, slots = self.lanes * self.cut.slots, self.cut.slots
        return self.cut.blocks * (self.region**2 + own * (self.region + slots))

    def cost(self, pair_cost: float) -> float:
        """Of a row, in units of what a token costs by itself."""
        slots = self.cut.blocks * (self.region + self.lanes * self.cut.slots)
        return slots + pair_cost * self.pairs if self.lanes else 0.0


@dataclasses.dataclass(frozen=True)
class Held:
    """What stands in the rows of a micro-batch, one row of each of M shards."""

    row_M: np.ndarray
    prompt_lengths_P: np.ndarray  # row after row
    # [P, G, F]: tokens of a completion, or those that a family has in common and that each of its
    # samples adds. All 0: not taken.
    runs_PGF: np.ndarray

    @functools.cached_property
    def lengths_PG(self) -> np.ndarray:
        """Tokens of each completion, or family."""
        return self.runs_PGF.sum(-1)

    @functools.cached_property
    def length_S(self) -> list[int]:
        """Tokens of completion prompt * G + g."""
        return self.lengths_PG.reshape(-1).tolist()

    @property
    def load_P(self) -> np.ndarray:
        """Tokens of each prompt and its completions; 0 where none is taken."""
        tokens_P = self.lengths_PG.sum(1)
        return np.where(tokens_P > 0, tokens_P + self.prompt_lengths_P, 0)


Dealt = list[list[int]]  # of each block of a micro-batch, the completions (prompt * G + g)


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
    everyone: Callable[[np.ndarray], np.ndarray] = lambda own: own,
    place: tuple[int, int] = (0, 1),
) -> list[list[Lanes[np.ndarray] | None]]:
    """The lanes of each update's micro-batches, for this process's shards; None where no shard has
    a completion.

    A micro-batch takes one row of each shard; rows change places inside their update only.

    Args:
        prompt_lengths_P: tokens of each prompt of this process.
        lengths_PG: tokens of each completion; 0: it is left out (and a prompt without any, too).
            Of families: `family_runs`, and ``budgets`` are theirs.
        budgets: rows are stored shard after shard, ``layout.rows`` of each.
        update_P: which update takes each prompt; None: all in its rows.
        everyone: rows of an array -> those of all processes, one after the other (collective).
        place: (index, count) of this process among those.
    """
    of_P = np.zeros_like(prompt_lengths_P) if update_P is None else update_P
    columns = [prompt_lengths_P, of_P, lengths_PG.reshape(len(of_P), -1)]
    table = everyone(np.column_stack(columns).astype(np.int32))
    batches = _micro_batches(table, budgets, by_update=update_P is not None)
    # Shards that share their work are alike, and so are their micro-batches: each may take its own
    # shape. Others would take a new one each time.
    alike = [[held] for held in batches] if budgets.spread else [batches]
    packed = []
    for some in alike:
        for held, shape, dealt in zip(some, *_cheapest(some, budgets), strict=True):
            packed.append(_arrays(held, dealt, shape, budgets, place) if shape.lanes else None)
    size = len(packed) // budgets.layout.updates
    return [packed[k * size : (k + 1) * size] for k in range(budgets.layout.updates)]


def family_runs(lengths_PG: np.ndarray, first_PG: np.ndarray, forks: int) -> np.ndarray:
    """[P, n, 1 + M]: tokens that each family of M completions lays down once, those of its first
    round (``first_PG``), and that each of them adds."""
    of_families = lambda x: x.reshape(len(x), -1, forks)  # noqa: E731
    first_PnM = of_families(np.minimum(lengths_PG, first_PG))
    own_PnM = of_families(lengths_PG) - first_PnM
    return np.concatenate([first_PnM.max(-1, keepdims=True), own_PnM], axis=-1)


def _cheapest(batches: list[Held], budgets: LaneBudgets) -> tuple[list[Shape], list[Dealt]]:
    """Of all ways to cut and deal out: the shapes of these micro-batches, and what stands where."""
    longest = max(int(held.lengths_PG.max()) for held in batches)
    best, shapes, dealt = math.inf, [], []
    for blocks in budgets.block_counts:
        for way in zip(*[_deal(held, blocks, budgets) for held in batches], strict=True):
            for slots in budgets.lane_slots(longest):
                cut, found = Cut(blocks, slots), []
                for count in (_least_lanes, _lane_count):  # what cannot be cheaper is not packed
                    found = _shapes(cut, batches, way, budgets, count)
                    cost = sum(shape.cost(budgets.pair_cost) for shape in found)
                    if cost >= best or not all(map(budgets.holds, found)):
                        break
                else:
                    best, shapes, dealt = cost, found, [*way]
    return shapes, dealt


def _micro_batches(table: np.ndarray, budgets: LaneBudgets, *, by_update: bool) -> list[Held]:
    """Of all updates, one after the other. Inside an update a shard's rows come in the order of
    their work. ``table`` has of each prompt its tokens, its update, its completions' tokens."""
    layout = budgets.layout
    row_V = np.concatenate([layout.rows_of(k) for k in range(layout.updates)])
    own_MVPX = table.reshape(-1, layout.rows, layout.per_row, table.shape[1])[:, row_V]
    runs_MVPX, size = own_MVPX[..., 2:], len(row_V) // layout.updates
    if by_update:
        of_V = np.repeat(np.arange(layout.updates), size)
        runs_MVPX = runs_MVPX * (own_MVPX[..., 1] == of_V[:, None])[..., None]
    work_MUA = runs_MVPX.sum((2, 3)).reshape(-1, layout.updates, size)
    order_MUA = np.argsort(-work_MUA, axis=-1, kind="stable")
    order_MV = (order_MUA + np.arange(layout.updates)[:, None] * size).reshape(-1, len(row_V))
    every_M = np.arange(len(order_MV))
    return [
        Held(
            row_V[order_M].astype(np.int32),
            own_MVPX[every_M, order_M, :, 0].reshape(-1),
            runs_MVPX[every_M, order_M].reshape(len(order_M) * layout.per_row, budgets.group, -1),
        )
        for order_M in order_MV.T
    ]


def _deal(held: Held, blocks: int, budgets: LaneBudgets) -> list[Dealt]:
    """Ways to deal the completions of a micro-batch out to the blocks of its shards."""
    load_P, per_row = held.load_P, budgets.layout.per_row
    if not budgets.spread:
        first_M = range(0, len(load_P), per_row)
        rows = [(p, even_out(load_P[p : p + per_row], blocks)) for p in first_M]
        prompts_X = [[first + p for p in block] for first, row in rows for block in row]
        return [[_samples(held, prompts) for prompts in prompts_X]]
    whole = even_out(load_P, len(held.row_M) * blocks)
    dealt = [_samples(held, prompts) for prompts in whole]
    return [dealt, _split(held, dealt, budgets.places(blocks))]


def even_out(load_P: np.ndarray, blocks: int) -> list[list[int]]:
    """As many prompts for each block, their loads evened out: the largest first, each to the block
    that has least."""
    members: list[list[int]] = [[] for _ in range(blocks)]
    loads, most = [0] * blocks, len(load_P) // blocks
    for p in np.argsort(-load_P, kind="stable").tolist():
        b = min((b for b in range(blocks) if len(members[b]) < most), key=loads.__getitem__)
        members[b].append(p)
        loads[b] += int(load_P[p])
    return members


def _samples(held: Held, prompts: list[int]) -> list[int]:
    """The completions that are taken of some prompts."""
    G = held.lengths_PG.shape[1]
    return [p * G + g for p in sorted(prompts) for g in np.flatnonzero(held.lengths_PG[p]).tolist()]


def _split(held: Held, dealt: Dealt, most: int) -> Dealt:
    """Completions leave the block with most tokens for the one with least, as long as that lowers
    the larger of the two; a block has ``most`` prompts at most."""
    G, length_S = held.lengths_PG.shape[1], held.length_S
    of_prompt = held.prompt_lengths_P.tolist()
    blocks, counts = [list(samples) for samples in dealt], []
    for samples in blocks:
        counts.append(Counter(s // G for s in samples))
    loads = [
        sum(length_S[s] for s in samples) + sum(of_prompt[p] for p in count)
        for samples, count in zip(blocks, counts, strict=True)
    ]
    while True:
        full, bare = loads.index(max(loads)), loads.index(min(loads))
        best, moving, change = loads[full], -1, (0, 0)
        for s in blocks[full]:
            p = s // G
            if len(counts[bare]) == most and p not in counts[bare]:
                continue
            less = length_S[s] + (of_prompt[p] if counts[full][p] == 1 else 0)
            more = length_S[s] + (0 if p in counts[bare] else of_prompt[p])
            if max(loads[full] - less, loads[bare] + more) < best:
                best = max(loads[full] - less, loads[bare] + more)
                moving, change = s, (less, more)
        if moving < 0:
            return [sorted(samples) for samples in blocks]
        blocks[full].remove(moving)
        blocks[bare].append(moving)
        counts[full] -= Counter([moving // G])
        counts[bare][moving // G] += 1
        loads[full] -= change[0]
        loads[bare] += change[1]


def _lanes(samples: list[int], length_S: list[int], slots: int) -> list[list[int]]:
    """First-fit decreasing of some completions."""
    lanes: list[list[int]] = []
    rooms: list[int] = []
    for s in sorted(samples, key=lambda s: -length_S[s]):
        lane = next((i for i, room in enumerate(rooms) if room >= length_S[s]), len(lanes))
        if lane == len(lanes):
            lanes.append([])
            rooms.append(slots)
        lanes[lane].append(s)
        rooms[lane] -= length_S[s]
    return lanes


def _lane_count(samples: list[int], length_S: list[int], slots: int) -> int:
    return len(_lanes(samples, length_S, slots))


def _least_lanes(samples: list[int], length_S: list[int], slots: int) -> int:
    """Fewer cannot hold them."""
    return math.ceil(sum(length_S[s] for s in samples) / slots)


def _shapes(
    cut: Cut,
    batches: list[Held],
    way: Iterable[Dealt],
    budgets: LaneBudgets,
    count: Callable[[list[int], list[int], int], int],
) -> list[Shape]:
    """Of each micro-batch: what its neediest block takes, rounded up to the grids."""
    G, lanes, tokens = budgets.group, [], 0
    for held, dealt in zip(batches, way, strict=True):
        lanes.append(max(count(samples, held.length_S, cut.slots) for samples in dealt))
        prompts = ([*{s // G for s in samples}] for samples in dealt)
        tokens = max(tokens, *(int(held.prompt_lengths_P[own].sum()) for own in prompts), 0)
    # Whole prompts that fill their budget end at it; a copy may come on top.
    usual, most = budgets.layout.per_row // cut.blocks, budgets.places(cut.blocks)
    unit = math.ceil(budgets.prompt_tokens / 8)
    region = unit * round_up(math.ceil(tokens / unit))
    ends = [n * budgets.prompt_tokens for n in (usual, most)]
    region = min([region, *(end for end in ends if end >= tokens)])
    ends = [n * G for n in (usual, most)]
    return [Shape(cut, region, min([round_up(n), *(e for e in ends if e >= n)])) for n in lanes]


def round_up(n: int, parts: int = 8) -> int:
    """``n`` up to ``parts``, above that the next number on a grid with about as many steps to an
    octave (a power of two)."""
    step = 2 ** max(0, n.bit_length() - parts.bit_length())
    return -(-n // step) * step


def _arrays(
    held: Held, dealt: Dealt, shape: Shape, budgets: LaneBudgets, place: tuple[int, int]
) -> Lanes[np.ndarray]:
    """Index arrays of the shards that process ``place`` (index, count) holds."""
    G, blocks, per_row = budgets.group, shape.cut.blocks, budgets.layout.per_row
    most, shards = budgets.places(blocks), len(held.row_M) // place[1]
    pick = np.zeros((shards, blocks * most), np.int32)
    prompt, prompt_at = (np.full((shards * blocks, shape.region), n, np.int32) for n in (-1, 0))
    size, forks = (shards * blocks, shape.lanes, shape.cut.slots), held.runs_PGF.shape[2] - 1
    sample, sample_at, run, trunk = (np.full(size, n, np.int32) for n in (-1, 0, -1, -1))
    first, length_S = place[0] * shards, held.length_S
    for x in range(shards * blocks):
        samples, (m, b) = dealt[first * blocks + x], divmod(x, blocks)
        prompts = sorted({s // G for s in samples})
        at = {p: p - (first + m) * per_row for p in prompts}
        if budgets.spread:
            at = {p: b * most + i for i, p in enumerate(prompts)}
            pick[m, list(at.values())] = prompts
        _fill(prompt[x], prompt_at[x], [(at[p], 0, held.prompt_lengths_P[p]) for p in prompts])
        for c, lane in enumerate(_lanes(samples, length_S, shape.cut.slots)):
            runs = [held.runs_PGF[divmod(s, G)].tolist() for s in lane]
            firsts = [(at[s // G] * G + s % G) * max(forks, 1) for s in lane]
            items = [item for one in zip(firsts, runs, strict=True) for item in _items(*one)]
            _fill(sample[x, c], sample_at[x, c], items)
            if forks:
                _link(run[x, c], trunk[x, c], runs)
    row_M, pick = held.row_M[first : first + shards], pick if budgets.spread else None
    links = (run, trunk) if forks else (None, None)
    return Lanes(row_M, prompt, prompt_at, sample, sample_at, pick, *links)


def _items(sample: int, runs: list[int]) -> Iterable[tuple[int, int, int]]:
    """(sample, its first token there, tokens) of a completion's runs, or of a family's."""
    shared, *own = runs
    yield sample, 0, shared
    for i, tokens in enumerate(own):
        yield sample + i, shared, tokens


def _fill(which: np.ndarray, at: np.ndarray, items: Iterable[tuple[int, int, int]]) -> None:
    """Lays (item, its first token, tokens) one behind the other."""
    start = 0
    for item, begin, tokens in items:
        end = start + int(tokens)
        which[start:end], at[start:end] = item, np.arange(begin, begin + end - start)
        start = end


def _link(run: np.ndarray, trunk: np.ndarray, families: list[list[int]]) -> None:
    """Fills in ``Lanes.run`` and ``Lanes.trunk`` of a lane of families one behind the other."""
    end = 0
    for shared, *own in families:
        start, end = end, end + shared
        run[start:end], before = end - 1, end - 1
        for tokens in own:
            start, end = end, end + tokens
            run[start:end], trunk[start:end] = end - 1, before


def slots_and_tokens(packed: Iterable[Lanes[np.ndarray] | None]) -> tuple[int, int]:
    """Slots that a pass over these rows computes, and the tokens that stand in them."""
    arrays = [x for lanes in packed if lanes for x in (lanes.prompt, lanes.sample)]
    return sum(x.size for x in arrays), sum(int((x >= 0).sum()) for x in arrays)
