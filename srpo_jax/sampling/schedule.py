"""Which sample runs in which slot: the host's half of the sampler, in plain numpy.

Every data shard has J *slots*, each of which decodes one sample, and C *rows*, each of which holds
the cache of one prompt. A prompt takes a row and G slots as soon as there are that many free ones;
a slot is free when its sample is done, a row when its last sample is. When nothing waits any more,
the samples left are moved together, and a narrower program decodes them (``widths``). Attention
reads the first W columns of every ring, W from ``windows``: as short as the oldest sample allows.

Every process keeps the same schedule, since all it follows from is replicated.
"""

import dataclasses
from typing import Generic, NamedTuple

import numpy as np

from srpo_jax.structs import Leaf

MIN_WINDOW, MAX_WINDOWS = 64, 5
MIN_WIDTH = 8  # fewer slots read the same weights: they save nothing


def windows(R: int) -> list[int]:
    """Columns that attention may be limited to, ascending: R, and its halves while they pay."""
    found = [R]
    while found[0] > MIN_WINDOW and len(found) < MAX_WINDOWS:
        found.insert(0, -(-found[0] // 2))
    return found


def widths(J: int) -> list[int]:
    """Slots of a shard that a program may decode, ascending: J, its halves, and 3/4 and 3/8 of it,
    where most samples of a batch end."""
    least, found = min(J, MIN_WIDTH), {-(-J * 3 // 4), -(-J * 3 // 8), J}
    while J > least:
        J = -(-J // 2)
        found.add(J)
    return sorted({max(width, least) for width in found})


class Fill(NamedTuple, Generic[Leaf]):
    """A prompt for every shard, or none: what prefill is told."""

    prompt_Z: Leaf  # number of the prompt in its shard, -1: none
    row_Z: Leaf
    slot_ZG: Leaf


class Places(NamedTuple, Generic[Leaf]):
    """Where the slots' samples belong: what decode is told."""

    sample_ZJ: Leaf  # prompt * G + g, -1: none
    place_ZJ: Leaf  # row * G + g, 0 where there is no sample
    slot_ZCG: Leaf  # the slot of sample g of the prompt in row c, 0 where it has none


class Move(NamedTuple):
    """The slots anew, as many as ``slot_ZJ`` has: slot j takes what was in slot ``slot_ZJ[:, j]``,
    column r what was in ``column_R[r]``."""

    slot_ZJ: np.ndarray
    column_R: np.ndarray


@dataclasses.dataclass
class Schedule:
    """State of the slots of all shards, as the host knows it; starts empty."""

    shards: int  # Z
    prompts: int  # of a shard
    concurrent: int  # prompts of a shard whose samples all have a slot
    group: int  # G
    tokens: int  # R
    segment: int

    def __post_init__(self) -> None:
        self.J = self.concurrent * self.group
        self.C = min(self.prompts, 2 * self.concurrent)  # prompts that end leave slots to others
        self.windows, self.widths = windows(self.tokens), widths(self.J)
        self.window, self.width = self.windows[0], self.J
        # J slots, or since they were moved together as many as ``width`` says.
        self.sample_ZJ = np.full((self.shards, self.J), -1, np.int32)
        self.row_ZJ = np.zeros((self.shards, self.J), np.int32)
        self.length_ZJ = np.zeros((self.shards, self.J), np.int32)
        self.upcoming_Z = np.zeros(self.shards, np.int32)
        self.step = 0
        self.slot_steps = self.live_steps = 0

    @property
    def waiting(self) -> bool:
        """Prompts are left that have no slots yet."""
        return bool((self.upcoming_Z < self.prompts).any())

    @property
    def over(self) -> bool:
        """Every sample is done."""
        return not self.waiting and bool((self.sample_ZJ < 0).all())

    @property
    def idle_share(self) -> float:
        """Steps of slots without a live sample, of all steps of all slots that were decoded."""
        return 1 - self.live_steps / max(self.slot_steps, 1)

    def next_fill(self) -> Fill[np.ndarray] | None:
        """The next prompt of every shard that has room for one, placed.

        None where fewer than half of the shards that wait have room: all shards pay for a prefill.
        """
        prompt_Z, row_Z = np.full((2, self.shards), -1, np.int32)
        fill = Fill(prompt_Z, row_Z, np.zeros((self.shards, self.group), np.int32))
        waiting_Z = self.upcoming_Z < self.prompts
        for z in np.flatnonzero(waiting_Z):
            rows = set(range(self.C)) - set(self.row_ZJ[z, self.sample_ZJ[z] >= 0].tolist())
            slots = np.flatnonzero(self.sample_ZJ[z] < 0)[: self.group]
            if rows and len(slots) == self.group:
                fill.prompt_Z[z], fill.row_Z[z] = self.upcoming_Z[z], min(rows)
                fill.slot_ZG[z] = slots
        filled_Z = fill.prompt_Z >= 0
        if not filled_Z.any() or 2 * filled_Z.sum() < waiting_Z.sum():
            return None
        for z in np.flatnonzero(filled_Z):
            slots = fill.slot_ZG[z]
            self.sample_ZJ[z, slots] = fill.prompt_Z[z] * self.group + np.arange(self.group)
            self.row_ZJ[z, slots] = fill.row_Z[z]
            self.length_ZJ[z, slots] = 1
        self.upcoming_Z += filled_Z
        return fill

    def places(self) -> Places[np.ndarray]:
        """Where the samples of the slots belong now."""
        used_ZJ = self.sample_ZJ >= 0
        place_ZJ = np.where(used_ZJ, self.row_ZJ * self.group + self.sample_ZJ % self.group, 0)
        slot_ZX = np.zeros((self.shards, self.C * self.group), np.int32)
        shard, slot = np.nonzero(used_ZJ)
        slot_ZX[shard, place_ZJ[shard, slot]] = slot
        slot_ZCG = slot_ZX.reshape(self.shards, self.C, self.group)
        return Places(self.sample_ZJ.copy(), place_ZJ.astype(np.int32), slot_ZCG)

    def arrange(self) -> Move | None:
        """Chooses ``width`` and ``window`` for the next segment; what has to be moved for it."""
        before, column_R = self.window, np.arange(self.tokens, dtype=np.int32)
        longest = int(np.max(self.length_ZJ, initial=1, where=self.sample_ZJ >= 0))
        if longest > self.window:
            self.window = min(w for w in self.windows if w >= longest)
        else:  # leave room for a segment, lest it goes back and forth
            room = [w for w in self.windows if w >= longest + self.segment - 1]
            self.window = min([self.window, *room])
        if self.window != before and self.step > min(before, self.window):
            # Column r of the new window is that of the last step which is r modulo its width.
            last_R = self.step - 1 - (self.step - 1 - column_R) % self.window
            column_R = last_R % before
        width = self.width if self.waiting else min(w for w in self.widths if w >= self._live())
        if width == self.width and (column_R == np.arange(self.tokens)).all():
            return None
        live_first_ZJ = np.argsort(self.sample_ZJ < 0, axis=1, kind="stable")
        slot_ZJ = live_first_ZJ[:, :width]
        self.width = width
        for name in ("sample_ZJ", "row_ZJ", "length_ZJ"):
            setattr(self, name, np.take_along_axis(getattr(self, name), slot_ZJ, axis=1))
        return Move(slot_ZJ.astype(np.int32), column_R.astype(np.int32))

    def _live(self) -> int:
        return int((self.sample_ZJ >= 0).sum(axis=1).max())

    def limits(self) -> np.ndarray:
        """[2] int32: tokens of the next segment at most, and the number of live slots at which it
        has to end earlier: when a prompt can be filled in, or a narrower program would do."""
        longest = int(np.max(self.length_ZJ, initial=1, where=self.sample_ZJ >= 0))
        if self.waiting:
            stop = self.J - self.group
        else:
            stop = max([w for w in self.widths if w < self.width], default=0)
        if stop >= self._live():  # there is room, but not for all shards, or in no row
            stop = 0
        return np.array([min(self.segment, self.window - longest + 1), stop], np.int32)

    def look(self, length_ZJ: np.ndarray, done_ZJ: np.ndarray, step: int) -> None:
        """Takes in what a segment did: tokens of the samples, which are done, steps made so far."""
        used_ZJ = self.sample_ZJ >= 0
        self.slot_steps += (step - self.step) * self.shards * self.width
        self.live_steps += int((length_ZJ - self.length_ZJ)[used_ZJ].clip(0).sum())  # fillers: -1
        self.step, self.length_ZJ = step, np.where(used_ZJ, length_ZJ, 0)
        self.sample_ZJ = np.where(done_ZJ, -1, self.sample_ZJ)
