"""One micro-batch of GRPO: its share of an update's experience, and its tokens in lanes.

Axes: M rows (one a data shard), X lanes, C completions of a lane, T tokens of one, Y tokens of a
row; P prompts, G samples, R tokens of a completion at most, D width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from srpo_jax.learn import losses
from srpo_jax.learn.advantages import families
from srpo_jax.learn.grpo import GrpoConfig, Masked, Prepared, Tokens
from srpo_jax.learn.head import model_token_logps
from srpo_jax.learn.micro_batches import dealt_out, rows_of, without_vision
from srpo_jax.learn.objectives import Samples
from srpo_jax.learn.perception import View, side_by_side, views_of
from srpo_jax.model.layers import shard, take_in_rows
from srpo_jax.model.qwen2_5_vl import Qwen2_5_VL, predicting_slots
from srpo_jax.structs import Batch, Experience, Lanes, Rollout

Data = tuple[Batch, jax.Array | None, Any]  # prompts, image features, what else there is of them


@dataclasses.dataclass(frozen=True)
class Picked:
    """Completion tokens [M, Y] of each row of a micro-batch: the wanted ones first, then others."""

    sample_MY: jax.Array  # which completion of the row
    at_MY: jax.Array  # which of its tokens
    wanted_MY: jax.Array
    count: jax.Array  # the most wanted ones of any row

    def index(self, R: int) -> jax.Array:
        """Where a token stands among its row's completions, R slots each."""
        return self.sample_MY * R + self.at_MY

    def of_samples(self, x_PG: jax.Array) -> jax.Array:
        """[M, Y]: the sample's entry at each token."""
        return take_in_rows(x_PG.reshape(-1), self.sample_MY, len(self.sample_MY))

    def of_prompts(self, x_P: jax.Array, like_PG: jax.Array) -> jax.Array:
        """[M, Y]: the prompt's entry at each token; of ``like_PG`` the shape counts."""
        return self.of_samples(jnp.broadcast_to(x_P[:, None], like_PG.shape))

    def of_tokens(self, x_PGR: jax.Array) -> jax.Array:
        """[M, Y]: each token's own entry."""
        return take_in_rows(x_PGR.reshape(-1), self.index(x_PGR.shape[2]), len(self.sample_MY))


def own_part(data: Data, lanes: Lanes, cfg: GrpoConfig) -> Data:
    """Of a whole batch (prompts, features, what else there is of them) a micro-batch's part."""
    rows: Data = rows_of(data, lanes.row, cfg.micro_batches)
    return rows if lanes.pick is None else dealt_out(*rows, lanes.pick)


def lane_states(
    model: Qwen2_5_VL,
    data: tuple[Batch, jax.Array | None, Rollout],
    lanes: Lanes,
    wanted_XCT: jax.Array,
) -> tuple[jax.Array, jax.Array, Picked]:
    """Of one micro-batch's wanted tokens what predicts them [M, Y, D], themselves, and which they
    are.

    ``data``: its prompts, its image features (None: its images are encoded here), its rollout. The
    head sees the wanted tokens only: they come first, and the rest is left out.
    """
    batch, features_MND, rollout = data
    M, (P, G, _) = len(lanes.row), rollout.completions.shape
    if features_MND is None and batch.vision is not None:
        features_MND = model.encode_images(batch.vision)
    x_XYD = model.lane_stream(batch, features_MND, rollout.completions, lanes)
    X, slots, D = x_XYD.shape
    by_row = lambda x: x.reshape(M, -1)  # noqa: E731
    first_slot_X1 = (jnp.arange(X) % (X // M) * slots)[:, None]
    source_MY = by_row(predicting_slots(lanes, P // M, G) + first_slot_X1)
    order_MY, count = losses.weighted_first(by_row(wanted_XCT))
    source_MY, sample_MY, at_MY, wanted_MY = (
        jnp.take_along_axis(x, order_MY, axis=1)
        for x in (source_MY, *map(by_row, (lanes.sample, lanes.sample_at, wanted_XCT)))
    )
    picked = Picked(sample_MY, at_MY, wanted_MY, count)
    h_MYD = take_in_rows(x_XYD.reshape(X * slots, D), source_MY, M)
    h_MYD = model.text.norm(shard(h_MYD, "batch", None, None))
    return h_MYD, picked.of_tokens(rollout.completions), picked


def to_owners(
    pick_MQ: jax.Array, picked: Picked, logp_MY: jax.Array, shape: tuple[int, int], per_row: int
) -> tuple[jax.Array, jax.Array]:
    """[M, A], A = M * Y: where each token of a micro-batch stands in each shard's own row, out of
    range where it is another's; and the log-probs. ``shape``: (G, R)."""
    (G, R), M = shape, len(pick_MQ)
    prompt_MY = jnp.take_along_axis(pick_MQ, jnp.maximum(picked.sample_MY, 0) // G, axis=1)
    at_MY = (prompt_MY % per_row * G + picked.sample_MY % G) * R + picked.at_MY
    owner_MY = jnp.where(picked.wanted_MY, prompt_MY // per_row, -1)
    # All log-probs on every device: few bytes, beside a layer's weights.
    own_1A, at_1A, logp_1A = (x.reshape(1, -1) for x in (owner_MY, at_MY, logp_MY))
    at_MA = jnp.where(own_1A == jnp.arange(M)[:, None], at_1A, jnp.iinfo(jnp.int32).max)
    return at_MA, jnp.broadcast_to(logp_1A, at_MA.shape)


# --- of an update ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """What a micro-batch of an update is made of; None where the configuration does without."""

    cfg: GrpoConfig
    lanes: Lanes
    wanted_XCT: jax.Array  # tokens that weigh something
    view: View
    masked_view: View | None  # also None where no prompt has an image
    rollout: Rollout
    of_sample: dict[str, jax.Array]  # [P, G] each: `_by_sample`; "together" of shared first rounds
    ref_logp: jax.Array | None  # [P, G, R]
    old_logp: jax.Array | None  # [P, G, R]
    carried_P: jax.Array | None  # bool: sampled for an earlier step
    kl_coef_P: jax.Array | None

    def states(self, model: Qwen2_5_VL, view: View) -> tuple[jax.Array, jax.Array, Picked]:
        """`lane_states` of its tokens with a weight, seeing ``view``."""
        return lane_states(model, (*view, self.rollout), self.lanes, self.wanted_XCT)

    def tokens(self, model: Qwen2_5_VL, picked: Picked) -> Tokens:
        """[M, Y]: what the loss needs of each token."""
        cfg, of_sample = self.cfg, self.of_sample
        weight_PG = of_sample["weight"]
        after_MY = picked.at_MY >= picked.of_samples(of_sample["first_end"])
        adv, later = (picked.of_samples(of_sample[name]) for name in ("adv", "rest_adv"))
        weight_MY = _token_weights(of_sample, picked.of_samples, picked.at_MY)
        old_MY, on_policy_MY = self._old_logp(picked)
        coef_P = self.kl_coef_P
        return Tokens(
            adv=jnp.where(after_MY, later, adv) if cfg.parted else adv,
            weight=jnp.where(picked.wanted_MY, weight_MY, 0.0),
            sample_logp=picked.of_tokens(self.rollout.sample_logp),
            policy_logp=picked.of_tokens(self.rollout.policy_logp),
            old_logp=old_MY,
            on_policy=on_policy_MY,
            ref_logp=None if self.ref_logp is None else picked.of_tokens(self.ref_logp),
            samples=Samples(
                picked.sample_MY, picked.wanted_MY, weight_PG.size // len(self.lanes.row)
            ),
            kl_coef=None if coef_P is None else picked.of_prompts(coef_P, weight_PG),
            masked=self._masked(model, picked) if cfg.perception_coef else None,
        )

    def _old_logp(self, picked: Picked) -> tuple[jax.Array | None, jax.Array | None]:
        """[M, Y] log-probs of the policy that sampled, and where that is the one that is updated;
        None where it is so everywhere."""
        rollout, on_policy_PG = self.rollout, self.of_sample["on_policy"]
        if self.old_logp is None and self.carried_P is None:
            return None, None
        old_MY = picked.of_tokens(rollout.policy_logp if self.old_logp is None else self.old_logp)
        if self.carried_P is not None:
            carried_MY = picked.of_prompts(self.carried_P, on_policy_PG)
            old_MY = jnp.where(carried_MY, picked.of_tokens(rollout.policy_logp), old_MY)
        return old_MY, picked.of_samples(on_policy_PG)

    def _masked(self, model: Qwen2_5_VL, picked: Picked) -> Masked:
        """The same tokens behind masked images."""
        batch, _ = self.view
        has_image_P = (batch.vision_src >= 0).any(1)
        seen_MY = picked.of_prompts(has_image_P, self.of_sample["weight"])
        if self.masked_view is None:
            nothing_MY = jnp.zeros(seen_MY.shape, jnp.float32)
            return Masked(nothing_MY, nothing_MY, seen_MY)
        states, targets, _ = self.states(model, self.masked_view)
        found = model_token_logps(model, states, targets, self.cfg.head, picked.count)
        return Masked(*found, seen_MY)


def part_of(cfg: GrpoConfig, experience: Experience, ready: Prepared, lanes: Lanes) -> Part:
    """What ``lanes`` hold of the experience of a whole update."""
    batch = without_vision(experience.batch, experience.features)
    joint = side_by_side(experience.features, experience.masked)
    masked = experience.masked if joint is None else None
    old = (experience.old_logp, experience.carried, experience.kl_coef)
    ref_logp = experience.ref_logp if cfg.needs_reference else None
    rest = (experience.rollout, _by_sample(ready), ref_logp, old, masked)
    batch, joint, rest = own_part((batch, joint, rest), lanes, cfg)
    rollout, of_sample, ref_logp, old, masked = rest
    view, masked_view = views_of(batch, joint, masked, on=bool(cfg.perception_coef))

    def in_lanes(x_PG: jax.Array) -> jax.Array:
        return take_in_rows(x_PG.reshape(-1), lanes.sample, len(lanes.row))

    if lanes.run is not None:  # first rounds stand once for their families
        together_PN = families(of_sample["weight"], cfg.forks).sum(-1)
        of_sample["together"] = jnp.repeat(together_PN, cfg.forks, axis=1)
    weight_XCT = _token_weights(of_sample, in_lanes, lanes.sample_at)
    wanted_XCT = (lanes.sample >= 0) & (weight_XCT != 0)
    return Part(cfg, lanes, wanted_XCT, view, masked_view, rollout, of_sample, ref_logp, *old)


def _by_sample(ready: Prepared) -> dict[str, jax.Array]:
    """What is known of each sample [P, G]."""
    on_policy_PG = jnp.broadcast_to(ready.on_policy_P[:, None], ready.adv_PG.shape)
    return {
        "adv": ready.adv_PG,
        "rest_adv": ready.rest_adv_PG,
        "first_end": ready.first_end_PG,
        "weight": ready.weight_PG,
        "on_policy": on_policy_PG,
    }


def _token_weights(
    of_sample: dict[str, jax.Array], take: Callable[[jax.Array], jax.Array], at: jax.Array
) -> jax.Array:
    """What token ``at`` of the samples weighs whose entries ``take`` picks; in a first round that
    stands once for its family what it weighs in all samples together."""
    weight = take(of_sample["weight"])
    if "together" not in of_sample:
        return weight
    return jnp.where(at < take(of_sample["first_end"]), take(of_sample["together"]), weight)
