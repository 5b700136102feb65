"""Where a completion's first round ends, told token by token: samples of a family part there.

A group of G samples is G / M families of M samples. A family is one first round, and M completions
that go on from it. The cut is behind the token that completes the first ``</answer>`` after an
``<answer>``; a tag may take several tokens and share them with its neighbours, so an automaton
reads bytes, and a table tells what each token does to it: on the device, and on the host.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

OPENING, CLOSING = b"<answer>", b"</answer>"
CUT = len(OPENING) + len(CLOSING)  # the state in which the first answer is closed, for good


@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
    """State 0 begins a completion; tokens that do the same share a row of the table."""

    row_V: np.ndarray  # int32
    next_NS: np.ndarray  # int8 [rows, CUT + 1]

    @classmethod
    def of_tokens(cls, token_bytes: Sequence[bytes], vocab_size: int) -> "Automaton":
        """From the bytes of each token id; ids beyond them have none."""
        token_bytes = [*token_bytes[:vocab_size]]
        length_V = np.zeros(vocab_size, np.int32)
        length_V[: len(token_bytes)] = [len(one) for one in token_bytes]
        text = np.frombuffer(b"".join(token_bytes), np.uint8)
        start_V, step_SB = np.cumsum(length_V) - length_V, _steps()
        next_VS = np.tile(np.arange(CUT + 1, dtype=np.int8), (vocab_size, 1))
        for i in range(length_V.max(initial=0)):
            longer = np.flatnonzero(length_V > i)
            byte = text[start_V[longer] + i]
            next_VS[longer] = step_SB[next_VS[longer], byte[:, None]]
        next_NS, row_V = np.unique(next_VS, axis=0, return_inverse=True)
        return cls(row_V.reshape(-1).astype(np.int32), next_NS)

    def after(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """States, int32 of the shape of both, when ``token`` was read in ``state``."""
        row = jnp.asarray(self.row_V)[token]
        return jnp.asarray(self.next_NS)[row, state].astype(jnp.int32)

    def cuts(self, completions_PGR: np.ndarray, mask_PGR: np.ndarray) -> np.ndarray:
        """[P, G] int32 tokens of the first round: to the cut, all where there is none."""
        cut_PG = np.asarray(mask_PGR).sum(-1, dtype=np.int32)
        state_PG = np.zeros(cut_PG.shape, np.int8)
        for t in range(cut_PG.max(initial=0)):
            state_PG = self.next_NS[self.row_V[completions_PGR[..., t]], state_PG]
            cut_PG = np.where(state_PG == CUT, np.minimum(cut_PG, t + 1), cut_PG)
        return cut_PG


def _steps() -> np.ndarray:
    """[states, bytes] int8. Only its first byte begins a tag anew: a tag holds no other ``<``."""
    step_SB = np.full((CUT + 1, 256), CUT, np.int8)
    for begin, tag in ((0, OPENING), (len(OPENING), CLOSING)):
        for i, byte in enumerate(tag):
            step_SB[begin + i] = begin
            step_SB[begin + i, tag[0]] = begin + 1
            step_SB[begin + i, byte] = begin + i + 1
    return step_SB


def of_leader(x_ZG: jax.Array, forks: int) -> jax.Array:
    """Each family's first entry in the place of all, along the second axis: [Z, G, ...]."""
    return x_ZG[:, np.arange(x_ZG.shape[1]) // forks * forks]


def follow(
    drawn: Sequence[jax.Array],
    state_ZJ: jax.Array,
    place_ZJ: jax.Array,
    slot_ZCG: jax.Array,
    forks: int,
) -> list[jax.Array]:
    """What each slot [Z, J] drew; that of its family's leader where the first round goes on.

    Copied, as equal caches in different slots may give numbers that differ in their last bits.
    ``place_ZJ`` and ``slot_ZCG`` are those of `schedule.Places`.
    """
    slot_ZX = slot_ZCG.reshape(slot_ZCG.shape[0], -1)
    leader_ZJ = jnp.take_along_axis(slot_ZX, place_ZJ // forks * forks, axis=1)
    shared_ZJ = state_ZJ != CUT
    return [jnp.where(shared_ZJ, jnp.take_along_axis(x, leader_ZJ, axis=1), x) for x in drawn]
