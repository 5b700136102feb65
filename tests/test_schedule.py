"""The sampler's schedule: every sample runs once, sees its own columns, and few slots idle."""

import numpy as np
import pytest

from srpo_jax.sampling import schedule
from srpo_jax.sampling.schedule import Schedule, widths, windows


class Device:
    """Stands for the device: rings hold (sample, token) instead of keys; lengths are given.

    ``lengths_ZX`` are the tokens of sample x of shard z; 0 is a filler's.
    """

    def __init__(self, plan: Schedule, lengths_ZX: np.ndarray):
        Z, J, R = plan.shards, plan.J, plan.tokens
        self.plan, self.wanted = plan, lengths_ZX
        self.length, self.done = np.zeros((Z, J), int), np.ones((Z, J), bool)
        self.ring = np.full((Z, J, R, 2), -1)
        self.ended, self.step = np.zeros(lengths_ZX.shape, int), 0

    def run(self) -> None:
        while not self.plan.over:
            while (fill := self.plan.next_fill()) is not None:
                self.fill(fill)
            if (to := self.plan.arrange()) is not None:
                take = lambda x, slot_ZJ=to.slot_ZJ: np.stack(  # noqa: E731
                    [a[s] for a, s in zip(x, slot_ZJ, strict=True)]
                )
                self.length, self.done = take(self.length), take(self.done)
                self.ring = take(self.ring)[:, :, to.column_R]
            self.decode(self.plan.places(), *self.plan.limits())
            self.plan.look(self.length.copy(), self.done.copy(), self.step)

    def fill(self, fill) -> None:
        for z in np.flatnonzero(fill.prompt_Z >= 0):
            for g, slot in enumerate(fill.slot_ZG[z]):
                assert self.done[z, slot]  # nothing that runs is overwritten
                wanted = self.wanted[z, fill.prompt_Z[z] * self.plan.group + g]
                self.length[z, slot], self.done[z, slot] = min(wanted, 1), wanted <= 1
                self.ended[z, fill.prompt_Z[z] * self.plan.group + g] += wanted <= 1

    def decode(self, places, most: int, stop: int) -> None:
        assert 1 <= most <= self.plan.segment
        for _ in range(most):
            live = ~self.done & (places.sample_ZJ >= 0)
            if live.sum(axis=1).max() <= stop:
                return
            W = self.plan.window
            for z, j in zip(*np.nonzero(places.sample_ZJ >= 0), strict=True):
                sample, fed = places.sample_ZJ[z, j], self.length[z, j] - 1
                place = places.place_ZJ[z, j]
                assert places.slot_ZCG.reshape(self.plan.shards, -1)[z, place] == j
                self.ring[z, j, self.step % W] = sample, fed
                if self.done[z, j]:
                    continue
                ages = np.arange(fed + 1)
                seen = self.ring[z, j, (self.step - ages) % W]
                np.testing.assert_array_equal(seen[:, 0], sample)
                np.testing.assert_array_equal(seen[:, 1], fed - ages)
                self.length[z, j] += 1
                self.done[z, j] = self.length[z, j] >= self.wanted[z, sample]
                self.ended[z, sample] += self.done[z, j]
            self.step += 1


@pytest.mark.parametrize("concurrent", [1, 2, 5, 7])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_sample_runs_once_and_sees_what_it_wrote(monkeypatch, shards, concurrent):
    monkeypatch.setattr(schedule, "MIN_WINDOW", 3)
    monkeypatch.setattr(schedule, "MIN_WIDTH", 2)
    for seed, segment in enumerate((1, 4, 16)):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(0, 41, (shards, 7 * 3)) // rng.integers(1, 8, (shards, 1))
        lengths[:, 3:6] = 0  # a filler
        lengths[0, 8] = 40
        plan = Schedule(shards, 7, concurrent, 3, 40, segment)
        device = Device(plan, lengths)
        device.run()
        assert (device.ended == 1).all()
        assert plan.live_steps == (lengths - 1).clip(0).sum()
        assert 0 <= plan.idle_share < 1


def lognormal(mean: float, cap: int, count: int) -> np.ndarray:
    sigma = 0.8
    drawn = np.random.default_rng(0).normal(np.log(mean) - sigma**2 / 2, sigma, (1, count))
    return np.exp(drawn).astype(int).clip(2, cap)


def test_a_tail_costs_a_tail():
    lengths = lognormal(45, 256, 32 * 8)
    plan = Schedule(1, 32, 32, 8, 256, 32)
    Device(plan, lengths).run()
    assert plan.step == lengths.max() - 1  # nothing waited
    assert plan.idle_share < 0.25
    assert 1 - lengths.mean() / lengths.max() > 0.6  # which a width that stays would leave idle


def test_slots_of_ended_samples_are_filled_before_their_prompt_ends():
    lengths = lognormal(45, 256, 64 * 8)
    plan = Schedule(1, 64, 8, 8, 256, 32)
    Device(plan, lengths).run()
    assert plan.C == 16  # twice the prompts whose samples all have a slot
    assert plan.idle_share < 0.3


def test_windows_and_widths_are_few_and_end_at_the_whole():
    assert windows(2048) == [128, 256, 512, 1024, 2048]
    assert windows(300) == [38, 75, 150, 300]
    assert windows(64) == [64] and windows(1) == [1]
    assert widths(128) == [8, 16, 32, 48, 64, 96, 128]
    assert widths(20) == [8, 10, 15, 20]
    assert widths(8) == [8] and widths(3) == [3]
