"""The loss of an update beside TRL's own code: same log-probs, rewards and masks."""

import collections
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_helpers import G, P, R, prompts, rollout

from srpo_jax.learn import grpo
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.objectives import Samples
from srpo_jax.structs import Experience

pytestmark = pytest.mark.slow

EPS = 1e-4  # TRL's, not to be set there
CAP = 9  # tokens of "dr_grpo"
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
# Name -> ours (beside CLIP), and keys of TRL's GRPOConfig (beside epsilon=0.2).
CASES = {
    "grpo": ({}, {"loss_type": "grpo"}),
    "k3": (
        {"kl_coef": 0.3},
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    ),
    "clip-higher": ({"clip_high": 0.28}, {"loss_type": "grpo", "epsilon_high": 0.28}),
    "dual clip": ({"dual_clip": 1.5}, {"loss_type": "grpo", "delta": 1.5}),
    "dapo": (
        {"aggregation": "token", "clip_high": 0.28},
        {"loss_type": "dapo", "epsilon_high": 0.28},
    ),
    "dr_grpo": (
        {"aggregation": "constant", "advantage": "centred", "length_cap": CAP},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "max_completion_length": CAP},
    ),
    "gspo": (
        {"objective": "gspo", "clip_low": 0.05, "clip_high": 0.1},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.05,
            "epsilon_high": 0.1,
        },
    ),
    "cispo": (  # its epsilon_high is the cap itself
        {"objective": "cispo", "aggregation": "token", "clip_high": 0.3},
        {"loss_type": "cispo", "epsilon_high": 1.3},
    ),
    "sapo": ({"objective": "sapo"}, {"loss_type": "sapo"}),
    "gdpo": (
        {"normalise_terms": True},
        {"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum"},
    ),
}


@dataclasses.dataclass(frozen=True)
class Logps:
    """[P, G, R] float32 of all completions, under three policies."""

    now: np.ndarray
    old: np.ndarray
    reference: np.ndarray


def experience() -> Experience:
    """Eight groups of the shared rollout; none is filler."""
    return Experience(prompts().replace(valid=np.ones(P, bool)), *rollout())


def logps() -> Logps:
    rng = np.random.default_rng(7)
    now = rng.uniform(-4, -0.1, (P, G, R)).astype(np.float32)
    near = lambda: (now + rng.normal(0, 0.3, now.shape)).astype(np.float32)  # noqa: E731
    return Logps(now, near(), near())


def our_loss(cfg: GrpoConfig, held: Experience, given: Logps) -> tuple[float, np.ndarray]:
    """The loss, and its gradient [P, G, R] by the log-probs: one row of all tokens."""
    held = held.replace(ref_logp=given.reference)
    ready, flat = grpo.prepare(cfg, held), lambda x: jnp.asarray(x).reshape(1, -1)
    of_samples = lambda x: flat(jnp.repeat(x[..., None], R, axis=2))  # noqa: E731
    counted = flat(held.rollout.completion_mask)
    tokens = grpo.Tokens(
        adv=of_samples(ready.adv_PG),
        weight=jnp.where(counted, of_samples(ready.weight_PG), 0.0),
        sample_logp=flat(given.old),
        policy_logp=flat(given.old),
        old_logp=flat(given.old),
        ref_logp=flat(given.reference) if cfg.needs_reference else None,
        samples=Samples(of_samples(jnp.arange(P * G).reshape(P, G)), counted, number=P * G),
    )

    def loss(logp):
        return grpo.policy_loss(cfg, logp, jnp.zeros_like(logp), tokens)[0]

    value, gradient = jax.value_and_grad(loss)(flat(given.now))
    return float(value), np.asarray(gradient).reshape(P, G, R)


def trl_loss(
    keys: dict, cfg: GrpoConfig, held: Experience, given: Logps, folder: str
) -> tuple[float, np.ndarray]:
    """The same by TRL's `_generate_and_score_completions` and `_compute_loss`, in float64.

    A trainer without a model: what it samples, what the reward functions say and what the model's
    log-probs are is given to it; masks, advantages, ratios, KL and normaliser are its own.
    """
    torch = pytest.importorskip("torch")
    trl = pytest.importorskip("trl", reason="comes with requirements-test.txt")
    accelerate = pytest.importorskip("accelerate")
    args = trl.GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to=[], num_generations=G,
        per_device_train_batch_size=P * G, **({"epsilon": 0.2} | keys),
    )  # fmt: skip
    lengths = np.asarray(held.rollout.completion_mask).sum(-1).reshape(-1)
    ids = [[5] * n for n in lengths]
    terms = grpo.reward_terms(cfg, held.verdict).parts
    weights = torch.tensor([dict(cfg.weights).get(name, 1.0) for name in terms]).double()
    longest = int(lengths.max())
    now, old, reference = (
        torch.tensor(x.reshape(P * G, R)[:, :longest]).double()
        for x in (given.now, given.old, given.reference)
    )
    now.requires_grad_()

    class WithoutModel(trl.GRPOTrainer):
        model, ref_model = (
            SimpleNamespace(training=True, is_gradient_checkpointing=False) for _ in range(2)
        )
        accelerator = accelerate.Accelerator(cpu=True)
        current_gradient_accumulation_steps = 1
        environment_factories = environments = tools = off_policy_mask_threshold = None
        aux_loss_enabled = _entropy_bonus_enabled = False
        reward_func_names = reward_funcs = list(terms)
        _tokenizer = SimpleNamespace(pad_token_id=0, batch_decode=lambda *_, **__: [""] * P * G)

        def __init__(self):
            vars(self).update(vars(args), args=args, reward_weights=weights)
            self.epsilon_low = args.epsilon
            self.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
            self._metrics = {"train": collections.defaultdict(list)}
            self._logs = collections.defaultdict(list, rewards=collections.defaultdict(list))
            self._pending_extra_logs = self._pending_metrics = {}

        def _generate(self, prompts):
            return [[7]] * P * G, ids, None, [""] * P * G, None, {}, None, None

        def _calculate_rewards(self, *_):
            columns = [torch.tensor(np.asarray(x)).reshape(-1) for x in terms.values()]
            return torch.stack(columns, 1).double()

        def _get_per_token_logps_and_entropies(self, model, *_, **__):
            asked = reference if model is self.ref_model else now
            return asked, torch.zeros_like(asked), None

    trainer = WithoutModel()
    inputs = trainer._generate_and_score_completions([{"prompt": ""}] * P * G)
    inputs |= {"old_per_token_logps": old}
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradient = np.zeros((P * G, R))
    gradient[:, :longest] = now.grad.numpy()
    return loss.item(), gradient.reshape(P, G, R)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_trl(name, tmp_path):
    ours, keys = CASES[name]
    cfg, given = GrpoConfig(adv_eps=EPS, **(CLIP | ours)), logps()
    want, slope = trl_loss(keys, cfg, experience(), given, str(tmp_path))
    got, gradient = our_loss(cfg, experience(), given)
    assert abs(want) > 1e-3 and np.abs(slope).max() > 1e-3
    np.testing.assert_allclose(got, want, atol=1e-6, rtol=0)
    np.testing.assert_allclose(gradient, slope, atol=1e-6, rtol=0)
