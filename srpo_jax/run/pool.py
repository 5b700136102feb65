"""Dynamic sampling: which groups teach something, and groups that wait for a later update.

A group whose samples are all right or all wrong has little to teach. With ``filter.resample`` the
RL loop goes on sampling until a step has as many informative groups as its batch holds, over all
processes, and evens them out between these; those sampled beyond that wait here for the next step,
and lie in the checkpoint meanwhile. They are fewer than a batch, and so are used in that step: none
gets older than one step but what no row had room for, which ``filter.max_age`` ends.
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from srpo_jax.data.batching import Encoded, FirstFit, collate_packed
from srpo_jax.data.fields import Record
from srpo_jax.data.images import ImageRef
from srpo_jax.data.processing import Processor
from srpo_jax.rewards.profiles import OPENRLHF
from srpo_jax.run import processes
from srpo_jax.run.feed import Encode
from srpo_jax.run.host_state import Host, pack_host, unpack_host
from srpo_jax.run.rollout import Round
from srpo_jax.run.sections import DataSettings, FilterOn
from srpo_jax.structs import Experience, Rollout, Verdict


def informative(verdict: Verdict, low: float, high: float, on: FilterOn = "final") -> np.ndarray:
    """[P] float32: 1 where the accuracy of a group lies in [low, high], 0 elsewhere.

    It is the share of right ``final`` or ``first`` answers, with ``either`` one of the two (SRPO
    section 4.1 does not say which). The authors' code averages a ``composite`` of both, 0, 0.25,
    0.75 or 1, and so keeps groups in which nothing is left to learn (right in both rounds: 0.75).
    """
    final, first = verdict.final_correct, verdict.first_correct
    if on == "composite":
        counted = [OPENRLHF.terms(verdict)["r_acc"]]
    else:
        counted = {"final": [final], "first": [first], "either": [final, first]}[on]
    shares = [np.asarray(x, np.float32).mean(axis=1) for x in counted]
    return np.any([(x >= low) & (x <= high) for x in shares], axis=0).astype(np.float32)


# What an experience holds of the completions, of all prompts or (in a group) of one.
Samples = tuple[Rollout, Verdict]


@dataclasses.dataclass(frozen=True)
class Group:
    """One prompt with its graded completions, on the host."""

    record: Record
    step: int  # in which it was sampled: an earlier one means an older policy
    samples: Samples  # arrays without the prompt axis


class Pool:
    """Informative groups of this process that no update has used yet."""

    def __init__(self, encode: Encode, processor: Processor, data: DataSettings, max_age: int):
        """Groups that were sampled more than ``max_age`` steps ago are dropped."""
        self._encode, self._processor, self._data = encode, processor, data
        self._max_age = max_age
        self.groups: list[Group] = []  # the oldest first
        self._blank: Samples | None = None

    def add(self, one: Round, step: int) -> None:
        """Keep the groups of a round whose weight is not 0."""
        samples = (one.graded.rollout, one.graded.verdict)
        self._blank = jax.tree.map(lambda x: np.zeros_like(x[0]), samples)
        for record, p in zip(one.sampled.records, one.sampled.slots.tolist(), strict=True):
            if one.weight[p]:
                own = jax.tree.map(lambda x, p=p: x[p], samples)
                self.groups.append(Group(record, step, own))

    def drop_old(self, step: int) -> int:
        """Leave out what is too old in this step; how many groups that were.

        And what is of a later one, from which the run was rolled back.
        """
        before = len(self.groups)
        self.groups = [g for g in self.groups if 0 <= step - g.step <= self._max_age]
        return before - len(self.groups)

    def short(self, mesh: Mesh, room: int) -> bool:
        """Whether all processes together hold fewer groups than their updates have room for."""
        held = processes.once(processes.gather(len(self.groups) - room), mesh)
        return sum(held) < 0

    def even_out(self, mesh: Mesh, room: int) -> None:
        """Processes with more groups than their share give their newest ones away (collective).

        ``room`` is for how many the update has room in this process.
        """
        here, _ = processes.data_place(mesh)
        plan = moves(processes.once(processes.gather((len(self.groups), room)), mesh))
        if not plan:
            return
        kept = len(self.groups) - sum(giver == here for giver, _ in plan)
        leaving, self.groups = self.groups[kept:], self.groups[:kept]
        held = processes.once(processes.gather_bytes(pack_host(*_packed(leaving))), mesh)
        for place, packed in enumerate(held):
            takers = [taker for giver, taker in plan if giver == place]
            if here in takers:
                groups = _unpacked(*unpack_host(packed))
                self.groups += [g for g, to in zip(groups, takers, strict=True) if to == here]
        self.groups.sort(key=lambda group: group.step)

    def take(self, step: int, usable_B: np.ndarray) -> tuple[Experience, np.ndarray]:
        """The oldest groups, as many as fit, collated anew; the rest of the batch is filler.

        Args:
            step: the present one.
            usable_B: which places of this process's part of the update hold a prompt. Processes
                agree on the larger of their patch budgets (collective).

        Returns:
            this process's part of the update, on the host, its prompts with their pixels; and [P]
            int32: how many steps ago each group was sampled, by an older policy where not 0.
        """
        data = self._data
        places, needed = self._fill(usable_B)
        index = processes.maximum(sum(budget < needed for budget in data.patch_budgets))
        batch = collate_packed(
            [[place[1]] if place else [] for place in places],
            rows=len(places) // data.prompts_per_row,
            tokens=data.prompt_tokens,
            patches=data.patch_budgets[index] if data.patch_budgets else 0,
            pad_id=self._processor.pad_id,
            geometry=self._processor.geometry,
        )
        blank = self._blank
        if blank is None:  # after a restart
            blank = next(jax.tree.map(np.zeros_like, place[0].samples) for place in places if place)
        rollout, verdict = _stack([place[0].samples if place else blank for place in places])
        weight = batch.valid.astype(np.float32)
        age = np.array([step - place[0].step if place else 0 for place in places], np.int32)
        return Experience(batch, rollout, verdict, weight=weight), age

    def _fill(self, usable_B: np.ndarray) -> tuple[list[tuple[Group, Encoded] | None], int]:
        """Groups leave the pool for the first row that has room for them, oldest first.

        Returns what stands at each place, and the most patch slots that a row takes.
        """
        data, most = self._data, max(self._data.patch_budgets, default=0)
        fit = FirstFit(
            rows=len(usable_B) // data.prompts_per_row,
            per_row=data.prompts_per_row,
            tokens=data.prompt_tokens,
            patches=most,
            pack=False,
            usable_B=usable_B,
        )
        places: list[tuple[Group, Encoded] | None] = [None] * len(usable_B)
        left = []
        for group in self.groups:
            place = -1
            if (fit.count_B == 0)[usable_B].any():
                encoded = self._encode(group.record)  # images are decoded again
                place = fit.place(encoded)
            if place < 0:
                left.append(group)
            else:
                places[place] = (group, encoded)
        self.groups = left
        return places, most - int(fit.room_M.min())

    # --- checkpoint ---

    def state(self) -> Host:
        """JSON values and arrays from which `load` makes the same pool."""
        return _packed(self.groups)

    def load(
        self, held: Sequence[Host], place: tuple[int, int] = (0, 1), own_terms: int = 0
    ) -> None:
        """The inverse of `state`; groups without this run's number of own terms are left out.

        Args:
            held: of every place in the data; where their number is another, groups are dealt out.
            place: this process's (`processes.data_place`).
        """
        index, count = place
        if len(held) == count:
            groups = _unpacked(*held[index])
        else:
            everyone = [group for one in held for group in _unpacked(*one)]
            groups = sorted(everyone, key=lambda group: group.step)[index::count]
        terms = [0 if g.samples[1].own is None else g.samples[1].own.shape[-1] for g in groups]
        self.groups = [g for g, n in zip(groups, terms, strict=True) if n == own_terms]


def moves(held: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(from, to) of each group that has to move for all places to have their share.

    ``held`` are (groups, room) of each place; shares go by the room.
    """
    total, room = (sum(column) for column in zip(*held, strict=True))
    excess = [groups - total * own // room for groups, own in held]
    for place in sorted(range(len(held)), key=lambda p: -excess[p])[: sum(excess)]:
        excess[place] -= 1  # what does not divide stays where most are
    givers = [place for place, n in enumerate(excess) for _ in range(n)]
    takers = [place for place, n in enumerate(excess) for _ in range(-n)]
    return list(zip(givers, takers, strict=True))


def _packed(groups: list[Group]) -> Host:
    values = [{"record": _record_values(group.record), "step": group.step} for group in groups]
    if not groups:
        return {"pending": values}, {}
    rollout, verdict = _stack([group.samples for group in groups])
    parts = {"rollout": vars(rollout), "verdict": vars(verdict)}
    arrays = {
        f"{part}/{n}": x for part, held in parts.items() for n, x in held.items() if x is not None
    }
    return {"pending": values}, arrays


def _unpacked(values: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[Group]:
    groups = []
    for i, value in enumerate(values["pending"]):
        fields = value["record"]
        images = tuple(ImageRef(**image) for image in fields["images"])
        record = Record(**{**fields, "images": images, "choices": tuple(fields["choices"])})
        rollout, verdict = (
            {n.removeprefix(f"{part}/"): x[i] for n, x in arrays.items() if n.startswith(part)}
            for part in ("rollout", "verdict")
        )
        groups.append(Group(record, value["step"], (Rollout(**rollout), Verdict(**verdict))))
    return groups


def _stack(samples: list[Samples]) -> Samples:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *samples)


def _record_values(record: Record) -> dict[str, Any]:
    """The record as JSON values and bytes; further fields that JSON cannot hold are left out."""
    values = dataclasses.asdict(record)
    kept = {}
    for name, value in values["extra"].items():
        with contextlib.suppress(TypeError, ValueError):
            kept[name] = json.loads(json.dumps(value))
    return values | {"extra": kept}
