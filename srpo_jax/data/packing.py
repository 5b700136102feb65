"""Conversations of a batch in as few slots as they need: the shape of rows, and who stands where.

A step costs what its slots cost, whether tokens stand in them or not. So the conversations of a
batch stand one behind the other in its sequences, the largest first, each in the first one with
room for it (first-fit decreasing), and rows that stay empty are left out. What an update learns
from is the same, packed or not. Shapes come from a short list, because each of them is a program of
its own; all data shards run the same one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from srpo_jax.data.batching import FirstFit, Sized

TOO_MANY = 2**30  # rows that a shape would need which does not hold the samples
_UNIT = 128  # tokens; kernels want sequences in multiples of it
Groups = list[list[int]]  # of each sequence the samples, by their number


@dataclass(frozen=True)
class RowShape:
    """What a row holds."""

    places: int  # sequences
    tokens: int  # T of each


@dataclass(frozen=True)
class Placed:
    """Samples in rows of one shape, ``rows`` of each data shard in use."""

    shape: RowShape
    groups: Groups  # shard after shard, row after row
    rows: int
    patches: int  # slots of the neediest row


def row_shapes(whole: RowShape) -> list[RowShape]:
    """The whole budget, half of its places, ...; of one place three, two and one quarter."""
    shapes = [whole]
    while shapes[-1].places > 1:
        shapes.append(RowShape(-(-shapes[-1].places // 2), whole.tokens))
    for quarters in (3, 2, 1):
        tokens = -(-whole.tokens * quarters // (4 * _UNIT)) * _UNIT
        if tokens < shapes[-1].tokens:
            shapes.append(RowShape(1, tokens))
    return shapes


@dataclass(frozen=True)
class Packer:
    """Packs the samples of one process into ``rows`` rows of each of its ``shards``."""

    shards: int
    rows: int
    patches: int  # slots of a row

    def ways(self, samples: Sequence[Sized], whole: RowShape) -> Iterator[Placed | None]:
        """The samples in rows of each of `row_shapes`; None where they do not fit.

        They fit into the whole budget if `FirstFit` placed them there in their order.
        """
        for shape in row_shapes(whole):

            def need(i: int, tokens: int = shape.tokens) -> float:
                one = samples[i]
                return max(one.num_tokens / tokens, one.num_slots / max(self.patches, 1))

            order = sorted(range(len(samples)), key=need, reverse=True)
            placed = self._first_fit(samples, order, shape)
            if placed is None and shape == whole:
                placed = self._first_fit(samples, range(len(samples)), shape)
            yield placed

    def _first_fit(
        self, samples: Sequence[Sized], order: Sequence[int], shape: RowShape
    ) -> Placed | None:
        """First fit in this order: a row of every shard before another one of any."""
        count = self.shards * self.rows
        fit = FirstFit(rows=count, per_row=shape.places, tokens=shape.tokens, patches=self.patches)
        rows: list[Groups] = [[[] for _ in range(shape.places)] for _ in range(count)]
        for i in order:
            b = fit.place(samples[i])
            if b < 0:
                return None
            rows[b // shape.places][b % shape.places].append(i)
        for row in rows:  # where nothing was packed, all stand as they came
            row[:] = sorted(map(sorted, row), key=lambda group: group or [len(samples)])
        own = [row for s in range(self.shards) for row in rows[s :: self.shards]]
        return placed_in(shape, [group for row in own for group in row], samples, self.rows)


def cheapest(ways: Sequence[Placed | None], rows: Sequence[int]) -> tuple[int, Placed]:
    """The way that computes the fewest slots, with its number; ``rows`` is what each of them needs
    of a shard in all processes, `TOO_MANY` where one of these has None."""
    possible = [
        (need * way.shape.places * way.shape.tokens, need, number, way)
        for number, (way, need) in enumerate(zip(ways, rows, strict=True))
        if way is not None and need < TOO_MANY
    ]
    return min(possible, key=lambda one: one[:3])[2:]


def placed_in(shape: RowShape, groups: Groups, samples: Sequence[Sized], rows: int) -> Placed:
    """What ``groups`` need, ``rows`` rows of each shard."""
    per_row = [
        [i for group in groups[start : start + shape.places] for i in group]
        for start in range(0, len(groups), shape.places)
    ]
    slots = [sum(samples[i].num_slots for i in row) for row in per_row]
    used = [place % rows + 1 for place, row in enumerate(per_row) if row]
    return Placed(shape, groups, max(used, default=0), max(slots, default=0))
