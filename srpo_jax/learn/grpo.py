"""GRPO from arrays to loss and metrics: what ``steps.make_grpo_steps`` runs, without model or mesh.

``prepare`` looks at the whole rollout once (rewards, advantages, token weights); ``policy_loss``
turns the log-probs of one micro-batch into its share of the loss.
"""

import dataclasses
import functools
from typing import Generic

import flax.struct
import jax
import jax.numpy as jnp

from srpo_jax.learn import losses, objectives
from srpo_jax.learn.advantages import (
    AdvantageKind,
    Credit,
    advantages,
    families,
    has_signal,
    of_terms,
)
from srpo_jax.learn.head import HeadConfig
from srpo_jax.learn.objectives import KlKind, Level, ObjectiveKind, Samples
from srpo_jax.rewards.profiles import PAPER, Profile
from srpo_jax.rewards.terms import (
    ALPHA,
    RewardTerms,
    add_up,
    overlong,
    price,
    right_answers,
    stated_rightly,
)
from srpo_jax.structs import BLOCKS, Experience, Leaf, Rollout, Verdict

FIRST = "first"  # the term of ``reward.first``


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is optimised, and in how many updates: the keys of ``config.grpo``."""

    updates_per_rollout: int = 1  # splits the prompts among this many updates
    epochs: int = 1  # passes over a rollout, each of that many updates
    advantage: AdvantageKind = "group"
    adv_eps: float = 1e-6
    normalise_terms: bool = False  # each reward term by itself, then their sum over the update
    # "segments": the first round is paid by its own terms, what comes after by the others.
    credit: Credit = "whole"
    objective: ObjectiveKind = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # of "clip" and "gspo"; 0 or None: off
    sapo_positive: float = 1.0
    sapo_negative: float = 1.05
    kl_coef: float = 0.0  # 0: no reference model is needed
    kl_kind: KlKind = "k3"
    kl_in_reward: bool = False  # taken off each sample's reward (k1) instead of added to the loss
    kl_target: float = 0.0  # nats a token towards which kl_coef is adapted; 0: it is not
    ref_every: int = 0  # steps after which the policy becomes the reference; 0: never
    entropy_coef: float = 0.0
    # Of the KL between the policy and itself with masked images, which is raised; 0: no such pass.
    perception_coef: float = 0.0
    perception_mask: float = 0.6  # share of an image's patches that are masked
    masked_entropy_coef: float = 0.0  # as entropy_coef, of the policy with masked images
    aggregation: losses.Aggregation = "sequence"
    mask_truncated: bool = False  # samples cut off by the budget get no gradient
    # Cap of the importance weight against the sampler's log-probs; 0 or None: off.
    tis_cap: float | None = None
    tis_floor: float | None = None  # weights outside [floor, cap] become 0; 0 or None: they do not
    tis_level: Level = "token"
    logit_chunk: int = 1024  # tokens of a row whose logits exist at a time

    def __post_init__(self):
        for name in ("kl_target", "ref_every"):
            if (value := getattr(self, name)) and not self.kl_coef:
                raise ValueError(f"{name}={value}: there is no KL; set kl_coef above 0")
        if self.masked_entropy_coef and not self.perception_coef:
            raise ValueError(
                f"masked_entropy_coef={self.masked_entropy_coef}: no image is masked; set "
                "perception_coef above 0"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether ``ref_logp`` must be given to the step."""
        return self.kl_coef != 0

    @property
    def by_token(self) -> bool:
        """Whether a token's log-prob alone tells what it adds to the loss."""
        whole_sample = self.tis_cap and self.tis_level == "sequence"
        return self.objective != "gspo" and not whole_sample and not self.perception_coef

    @property
    def updates(self) -> int:
        """How many updates a rollout is used for."""
        return self.updates_per_rollout * self.epochs


@dataclasses.dataclass(frozen=True)
class GrpoConfig(Objective):
    """What the update does. ``temperature`` and ``forbidden_ids`` must be the sampler's."""

    micro_batches: int = 1  # rows of a data shard; gradients are summed over them
    profile: Profile = PAPER
    # Weights of reward terms that are not 1; "first", "verdict", "overlong", "price" bring theirs.
    weights: tuple[tuple[str, float], ...] = (("f_len", ALPHA),)
    own: tuple[str, ...] = ()  # names of the terms in ``Verdict.own``
    overlong_buffer: int = 0  # tokens before the cap in which "overlong" sets in
    temperature: float = 1.0
    forbidden_ids: tuple[int, ...] = ()
    forks: int = 1  # samples in a row that have one first round (``SamplingConfig.forks``)
    length_cap: int | None = None  # completion token limit, for aggregation "constant"

    @property
    def parted(self) -> bool:
        """Whether tokens behind the first round have an advantage of their own."""
        return self.credit == "segments" or self.forks > 1

    @property
    def shares(self) -> bool:
        """Whether the update computes a family's first round once: where its tokens mean the same
        in each of its samples."""
        return self.forks > 1 and self.by_token

    @property
    def head(self) -> HeadConfig:
        """How log-probs are computed."""
        learns_entropy = bool(self.entropy_coef or self.masked_entropy_coef)
        return HeadConfig(self.logit_chunk, self.temperature, self.forbidden_ids, learns_entropy)

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} has no log-probs; use one above 0")
        if min(self.micro_batches, self.updates_per_rollout, self.epochs) < 1:
            raise ValueError("micro_batches, updates_per_rollout and epochs must be at least 1")
        if dict(self.weights).get("overlong") and not (self.length_cap and self.overlong_buffer):
            raise ValueError("the term 'overlong' needs overlong_buffer and length_cap, in tokens")
        if self.aggregation == "constant" and not self.length_cap:
            raise ValueError("aggregation='constant' needs length_cap, the completion token limit")


@flax.struct.dataclass
class Prepared(Generic[Leaf]):
    """What the loss needs of each sample, from the whole update batch; and what it was like."""

    adv_PG: Leaf  # [P, G] float32, of the first round's tokens
    rest_adv_PG: Leaf  # [P, G] float32, of all tokens after it
    first_end_PG: Leaf  # [P, G] int32: where it ends
    weight_PG: Leaf  # [P, G] float32 of ``losses.token_weights``; 0: no gradient
    on_policy_P: Leaf  # [P] bool: the policy itself, as of now, is the old one
    tokens: Leaf  # [] float32 number of tokens with a weight, at least 1
    metrics: dict[str, Leaf] | Leaf  # of ``rollout_metrics``


@flax.struct.dataclass
class Masked:
    """The same tokens, predicted from prompts with masked images."""

    logp: jax.Array
    entropy: jax.Array
    seen: jax.Array  # bool: the prompt has an image


@flax.struct.dataclass
class Tokens:
    """Values of the completion tokens of a micro-batch, all of one shape, and of their samples."""

    adv: jax.Array
    weight: jax.Array  # 0: not counted
    sample_logp: jax.Array  # of the distribution really sampled from
    policy_logp: jax.Array  # of the policy that sampled, untruncated
    old_logp: jax.Array | None  # None: the policy that is differentiated
    ref_logp: jax.Array | None
    samples: Samples
    on_policy: jax.Array | None = None  # bool: here it is the old one, whatever old_logp says
    kl_coef: jax.Array | None = None  # where it is adapted; None: as configured
    masked: Masked | None = None  # where perception_coef asks for it


def prepare(cfg: GrpoConfig, experience: Experience, update: jax.Array | int = 0) -> Prepared:
    """Rewards, advantages and token weights of update number ``update``, of its valid prompts."""
    rollout, include_P = experience.rollout, experience.batch.valid
    if experience.update is not None:
        include_P = include_P & (experience.update == update % cfg.updates_per_rollout)
    terms = reward_terms(cfg, experience.verdict)
    weight_P = include_P.astype(jnp.float32)
    if experience.weight is not None:
        weight_P = weight_P * experience.weight.astype(jnp.float32)
    weight_PG = jnp.broadcast_to(weight_P[:, None], terms.total.shape)
    penalty_PG = None
    if cfg.kl_in_reward and experience.ref_logp is not None:
        d_PGR = jnp.where(rollout.completion_mask, rollout.policy_logp - experience.ref_logp, 0.0)
        coef = cfg.kl_coef if experience.kl_coef is None else experience.kl_coef[:, None]
        penalty_PG = -coef * d_PGR.sum(-1)
    adv_PG, rest_adv_PG = credited(
        cfg, terms, experience.verdict, counted_PG=weight_PG != 0, penalty_PG=penalty_PG
    )
    if cfg.mask_truncated:
        weight_PG = jnp.where(rollout.finished, weight_PG, 0.0)
    length_PG = rollout.completion_mask.sum(-1)
    weight_PG = losses.token_weights(
        length_PG.reshape(-1),
        weight_PG.reshape(-1),
        mode=cfg.aggregation,
        length_cap=cfg.length_cap,
    ).reshape(adv_PG.shape)
    counted_PG = jnp.where(weight_PG != 0, length_PG, 0)
    counted = jnp.sum(counted_PG, dtype=jnp.float32)
    if cfg.shares:
        first_PG = jnp.minimum(counted_PG, experience.verdict.first_end)
        once = jnp.sum(families(first_PG, cfg.forks).max(-1), dtype=jnp.float32)
        counted += once - jnp.sum(first_PG, dtype=jnp.float32)
    on_policy_P = jnp.broadcast_to(jnp.asarray(update) == 0, include_P.shape)
    if experience.carried is not None:
        on_policy_P &= ~experience.carried
    return Prepared(
        adv_PG=adv_PG,
        rest_adv_PG=rest_adv_PG,
        first_end_PG=jnp.asarray(experience.verdict.first_end),
        weight_PG=weight_PG,
        on_policy_P=on_policy_P,
        tokens=jnp.maximum(counted, 1.0),
        metrics=rollout_metrics(terms, experience.verdict, rollout, include_P),
    )


def reward_terms(cfg: GrpoConfig, verdict: Verdict) -> RewardTerms:
    """The profile's terms, those of ``cfg.weights`` and ``cfg.own`` beside them, of the verdict's
    shape; ValueError where two have one name."""
    parts, weights = cfg.profile.terms(verdict), dict(cfg.weights)
    if verdict.own is not None:
        if taken := sorted(parts.keys() & {*cfg.own}):
            raise ValueError(f"two reward terms are called {taken[0]}: rename your own")
        parts |= {name: verdict.own[..., i] for i, name in enumerate(cfg.own)}
    if weights.get(FIRST):
        parts[FIRST] = right_answers(verdict)[0].astype(jnp.float32)
    if weights.get("verdict"):
        parts["verdict"] = stated_rightly(verdict)
    if weights.get("price"):
        parts["price"] = price(verdict)
    if weights.get("overlong") and cfg.length_cap:
        parts["overlong"] = overlong(verdict.total_tokens, cfg.length_cap, cfg.overlong_buffer)
    return add_up(
        parts, {name: weight for name, weight in weights.items() if weight or name in parts}
    )


def credited(
    cfg: GrpoConfig,
    terms: RewardTerms,
    verdict: Verdict,
    *,
    counted_PG: jax.Array,
    penalty_PG: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Advantages [P, G] of the tokens of the first round, and of those after it.

    With ``credit="whole"`` they are the same. With "segments" the profile's ``first_terms`` and
    ``FIRST`` pay the first round and the others what comes after, each normalised by itself; the
    latter's baseline is the mean of the samples whose first answer was as right or wrong, since
    that was settled before.
    With forks (then the two are not the same for "whole" either) a first round earns the mean of
    its continuations, against the other first rounds, and a continuation is compared with those of
    its own first round alone. ``penalty_PG`` is one more term, of weight 1.
    """
    weights = dict(cfg.weights)
    parts = {name: (weights.get(name, 1.0), term) for name, term in terms.parts.items()}
    if penalty_PG is not None:
        parts["kl"] = (1.0, penalty_PG)

    def score(names: set[str], forks: int = 1, alike_PG: jax.Array | None = None) -> jax.Array:
        """Of families of so many samples, [P, n], as if each were one sample."""
        mean = lambda x_PG: families(x_PG, forks).mean(-1)  # noqa: E731
        held = [(weight, mean(term)) for name, (weight, term) in parts.items() if name in names]
        counted_Pn = families(counted_PG, forks).any(-1)
        scale = {"eps": cfg.adv_eps, "counted_PG": counted_Pn, "alike_PG": alike_PG}
        if cfg.normalise_terms:
            return of_terms(held, **scale)
        reward_Pn = sum((weight * term for weight, term in held), jnp.zeros(counted_Pn.shape))
        if names == set(parts) and penalty_PG is None:
            reward_Pn = mean(terms.total)
        return advantages(reward_Pn, cfg.advantage, **scale)

    first, rest = set(parts), set(parts)
    if cfg.credit == "segments":
        own = parts.keys() & {*cfg.profile.first_terms, FIRST}
        first, rest = own or first, rest - own
    if cfg.forks > 1:
        family_PG = jnp.broadcast_to(jnp.arange(counted_PG.shape[1]) // cfg.forks, counted_PG.shape)
        first_PG = jnp.repeat(score(first, cfg.forks), cfg.forks, axis=1)
        return first_PG, score(rest, alike_PG=family_PG)
    first_PG = score(first)
    if cfg.credit == "whole":
        return first_PG, first_PG
    return first_PG, score(rest, alike_PG=right_answers(verdict)[0])


def policy_loss(
    cfg: GrpoConfig, logp: jax.Array, entropy: jax.Array, tokens: Tokens
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """Share of one micro-batch in the loss of the update (SRPO equation 2).

    Without ``old_logp`` every ratio is exactly 1.

    Returns:
        loss [] (over micro-batches, shares add up to the loss), and what ``update_metrics`` reads.
    """
    weight, old = tokens.weight, jax.lax.stop_gradient(logp)
    if tokens.old_logp is not None:
        here = False if tokens.on_policy is None else tokens.on_policy
        old = jnp.where(here, old, tokens.old_logp)
    objective, ratio, held_back = _objective(cfg, logp, old, tokens)
    logp_diff = jnp.abs(old - tokens.policy_logp)
    per_token = {"ratio/mean": ratio, "entropy": entropy, "sampler/logp_diff_mean": logp_diff}
    per_token |= {name.replace("_", "/"): value for name, value in held_back.items()}
    if cfg.tis_cap:
        tis = objectives.importance_weight(
            old,
            tokens.sample_logp,
            cap=cfg.tis_cap,
            floor=cfg.tis_floor or None,
            samples=tokens.samples if cfg.tis_level == "sequence" else None,
        )
        objective = objective * tis
        per_token["sampler/tis_weight"] = tis
    parts = {"loss/policy": losses.aggregate(objective, weight)}
    loss = parts["loss/policy"]
    if tokens.ref_logp is not None:
        per_token["kl"] = objectives.kl_estimate(logp, tokens.ref_logp, cfg.kl_kind)
        parts["loss/kl"] = losses.aggregate(per_token["kl"], weight)
        if not cfg.kl_in_reward:
            coef = cfg.kl_coef if tokens.kl_coef is None else tokens.kl_coef
            loss = loss + losses.aggregate(coef * per_token["kl"], weight)
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * losses.aggregate(entropy, weight)
    if tokens.masked is not None:
        seen, masked = tokens.masked.seen, tokens.masked
        kl = objectives.perception_kl(logp, masked.logp)
        per_token["perception/kl"] = jnp.where(seen, kl, 0.0)
        per_token["perception/entropy"] = jnp.where(seen, masked.entropy, 0.0)
        gain = cfg.perception_coef * kl + cfg.masked_entropy_coef * masked.entropy
        parts["loss/perception"] = -losses.aggregate(gain, jnp.where(seen, weight, 0.0))
        loss = loss + parts["loss/perception"]
    counted = weight != 0
    aux = {
        "parts": parts | {"loss": loss},
        "token_sums": {k: jnp.sum(jnp.where(counted, v, 0.0)) for k, v in per_token.items()},
        "maxima": {
            "ratio/max": jnp.max(jnp.where(counted, ratio, -jnp.inf)),
            "-ratio/min": jnp.max(jnp.where(counted, -ratio, -jnp.inf)),
            "sampler/logp_diff_max": jnp.max(jnp.where(counted, logp_diff, -jnp.inf)),
        },
    }
    return loss, jax.lax.stop_gradient(aux)


def _objective(
    cfg: GrpoConfig, logp: jax.Array, old: jax.Array, tokens: Tokens
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The policy-gradient loss of each token, its ratio, and where a bound holds back the gradient
    (float32, without a gradient)."""
    adv, ratio, held_back = tokens.adv, objectives.ratio_of(logp, old), {}
    if cfg.objective in ("clip", "gspo"):
        if cfg.objective == "gspo":
            ratio = objectives.sequence_ratio(logp, old, tokens.samples)
        bounds = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
        loss, held_back = objectives.clipped_loss(
            ratio, adv, **bounds, dual_clip=cfg.dual_clip or None
        )
    elif cfg.objective == "cispo":
        loss, held_back = objectives.cispo_loss(ratio, logp, adv, cfg.clip_high)
    elif cfg.objective == "sapo":
        loss = objectives.sapo_loss(
            ratio, adv, positive=cfg.sapo_positive, negative=cfg.sapo_negative
        )
    else:
        raise ValueError(f"objective must be clip, gspo, cispo or sapo, not {cfg.objective!r}")
    held_back = {name: value.astype(jnp.float32) for name, value in held_back.items()}
    return loss, jax.lax.stop_gradient(ratio), jax.lax.stop_gradient(held_back)


Aux = dict[str, dict[str, jax.Array]]  # of ``policy_loss``


def combine_aux(aux: Aux) -> Aux:
    """Of sets of tokens, stacked on a leading axis, together."""
    combine = {"parts": jnp.sum, "token_sums": jnp.sum, "maxima": jnp.max}
    return {
        kind: jax.tree.map(functools.partial(combine[kind], axis=0), x) for kind, x in aux.items()
    }


def no_aux(cfg: GrpoConfig) -> Aux:
    """Of no token at all."""
    nothing = jnp.zeros((1, 1), jnp.float32)
    ref_logp = nothing if cfg.needs_reference else None
    samples = Samples(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), bool), number=1)
    masked = Masked(nothing, nothing, nothing > 0) if cfg.perception_coef else None
    tokens = Tokens(
        *(nothing,) * 4, old_logp=None, ref_logp=ref_logp, samples=samples, masked=masked
    )
    return policy_loss(cfg, nothing, nothing, tokens)[1]


def update_metrics(aux: Aux, tokens: jax.Array) -> dict[str, jax.Array]:
    """Metrics of the update from what all of its micro-batches add up to.

    Means are over ``tokens``, the number of tokens that have a weight; without any, all are 0.
    """
    means = {k: v / tokens for k, v in aux["token_sums"].items()}
    maxima = {k: jnp.where(jnp.isneginf(v), 0.0, v) for k, v in aux["maxima"].items()}
    maxima["ratio/min"] = -maxima.pop("-ratio/min")
    return aux["parts"] | means | maxima


def rollout_metrics(
    terms: RewardTerms, verdict: Verdict, rollout: Rollout, include_P: jax.Array
) -> dict[str, jax.Array]:
    """What the samples of the included prompts were like: float32 scalars.

    Rates are shares of samples. Those of some samples come as ``NAME/count`` of ``NAME/of``, so
    that they can be added up over steps: ``fix`` (wrong, then right), ``harm`` (right, then wrong);
    ``right_reflected`` and ``right_one_round`` (final answers of samples with and without a second
    round); of those with a reflection ``stated`` (it says right or wrong), ``detection`` (a wrong
    first answer is called so), ``false_alarm`` (a right one is called wrong); ``tokens_right`` and
    ``tokens_wrong`` (tokens of samples by their final answer).
    """
    include_PG = jnp.broadcast_to(include_P.astype(jnp.float32)[:, None], terms.total.shape)
    samples = jnp.maximum(include_PG.sum(), 1.0)
    prompts = jnp.maximum(include_P.sum(dtype=jnp.float32), 1.0)

    def total(x_PG):
        return jnp.sum(x_PG.astype(jnp.float32) * include_PG)

    def mean(x_PG):
        return total(x_PG) / samples

    first, final = verdict.first_correct, verdict.final_correct
    length_PG = rollout.completion_mask.sum(-1).astype(jnp.float32)
    reflected, doubted = verdict.block_tokens[..., 2] > 0, verdict.stated < 0
    one_round = verdict.has_first & ~verdict.has_second
    reward_mean = mean(terms.total)
    spread_PG = jnp.square(terms.total - terms.total.mean(1, keepdims=True))
    group_std_P = jnp.sqrt(spread_PG.sum(1) / max(1, terms.total.shape[1] - 1))
    signal_P = has_signal(terms.total).astype(jnp.float32)
    metrics = {
        "reward/mean": reward_mean,
        "reward/std": jnp.sqrt(mean(jnp.square(terms.total - reward_mean))),
        "reward/group_std": jnp.sum(group_std_P * include_P) / prompts,
        "groups_without_signal": jnp.sum((1.0 - signal_P) * include_P) / prompts,
        "accuracy/first": mean(first),
        "accuracy/final": mean(final),
        "fix/count": total(~first & final),
        "fix/of": total(~first),
        "harm/count": total(first & ~final),
        "harm/of": total(first),
        "reflected/count": total(reflected),
        "reflected/of": samples,
        "right_reflected/count": total(final & verdict.has_second),
        "right_reflected/of": total(verdict.has_second),
        "right_one_round/count": total(final & one_round),
        "right_one_round/of": total(one_round),
        "stated/count": total(reflected & (verdict.stated != 0)),
        "stated/of": total(reflected),
        "detection/count": total(reflected & ~first & doubted),
        "detection/of": total(reflected & ~first),
        "false_alarm/count": total(reflected & first & doubted),
        "false_alarm/of": total(reflected & first),
        "tokens_right/count": total(length_PG * final),
        "tokens_right/of": total(final),
        "tokens_wrong/count": total(length_PG * ~final),
        "tokens_wrong/of": total(~final),
        "format_rate": mean(verdict.format_ok),
        "truncated_share": mean(~rollout.finished),
        "completion_length/mean": mean(length_PG),
        "completion_length/max": jnp.max(length_PG * include_PG),
        "samples": include_PG.sum(),
        "tokens": total(length_PG),
    }
    for name, term in terms.parts.items():
        metrics[f"reward/{name}"] = mean(term)
    for i, block in enumerate(BLOCKS):
        metrics[f"block_tokens/{block}"] = mean(verdict.block_tokens[..., i])
    return metrics
