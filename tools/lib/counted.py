"""Bytes that a run holds on a device, counted by hand: what is quick enough to try many settings.

Parameters, optimizer state, gradients, caches and batches follow from shapes and shardings and are
exact. Temporaries are a rule fitted to compiled programs (docs/scaling.md says how well it does);
`tools.plan` compiles what is to be relied on.
"""

import dataclasses

import jax
import jax.numpy as jnp

from srpo_jax.learn import optim
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.sampling.sampler import SamplingConfig
from tools.lib.planned import Recipe
from tools.lib.programs import (
    abstract_batch,
    abstract_experience,
    device_bytes,
    reference_bytes,
    sampler_inputs,
    shared_bytes,
    train_inputs,
)
from tools.lib.topologies import GIB

# Of the layer at work, in the update: arrays as wide as the mlp and as the model.
MLP_ARRAYS, MODEL_ARRAYS = 4, 9
MODEL_ARRAYS_APART = 15  # with tensor, where sums come on top


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes on one device; of sampling and updating the larger one counts."""

    parameters: int
    optimizer: int  # 0 where it waits in host memory, as
    reference: int
    host: int  # what waits there
    moved: int  # of it what the end of the update brings back
    gradients: int  # their sum, and those of one micro-batch beside it
    sampler: int  # parameters as it reads them, beyond those that are shared; caches; logits
    batch: int  # features while sampling, all of the experience while updating
    temporaries: int  # of the update

    @property
    def sampling(self) -> float:
        """GiB while sampling; 0 where nothing is sampled."""
        always = self.parameters + self.optimizer + self.reference + self.batch
        return (always + self.sampler) / GIB if self.sampler else 0.0

    @property
    def updating(self) -> float:
        """GiB while updating."""
        always = self.parameters + self.optimizer + self.reference + self.batch
        one = self.gradients // 2
        return (always + one + max(one + self.temporaries, self.moved)) / GIB

    @property
    def most(self) -> float:
        """GiB that must be there."""
        return max(self.sampling, self.updating)


def count(recipe: Recipe) -> Held:
    """What a device holds of the run."""
    state, params = train_inputs(recipe, optim.make_optimizer(recipe.optimizer, 1000))
    trained = {
        p: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
        for p, x in state.params.items()
    }
    if isinstance(recipe.step, GrpoConfig):
        assert recipe.sampling, "a GRPO recipe says how it samples"
        batch = device_bytes(abstract_experience(recipe, recipe.step, recipe.sampling))
        sampler = _sampler(recipe, recipe.sampling, params)
    else:
        batch, sampler = device_bytes(abstract_batch(recipe)), 0
    reference, offload = reference_bytes(recipe, state), recipe.optimizer.offload
    moments = device_bytes(state.opt_state)
    return Held(
        parameters=device_bytes(params),
        optimizer=0 if offload else moments,
        reference=0 if offload else reference,
        host=moments + reference if offload else 0,
        moved=moments if offload else 0,
        gradients=2 * device_bytes(trained),
        sampler=sampler,
        batch=batch,
        temporaries=_temporaries(recipe),
    )


def _sampler(recipe: Recipe, sampling: SamplingConfig, params: dict) -> int:
    _, args = sampler_inputs(recipe, sampling)
    own, *rest = args["decode_segment"]
    slots = rest[1][0].done.shape[1]
    logits = 4 * slots * recipe.model.text.vocab_size // recipe.mesh.shape["tensor"]
    return device_bytes(own) - shared_bytes(own, params) + device_bytes(rest) + logits


def _temporaries(recipe: Recipe) -> int:
    """Of one micro-batch's forward and backward pass, without its gradients."""
    text, tensor = recipe.model.text, recipe.mesh.shape["tensor"]
    item, step, shapes = jnp.dtype(recipe.model.dtype).itemsize, recipe.step, recipe.shapes
    tokens = shapes.sequences // shapes.rows * shapes.tokens
    if recipe.sampling:
        group, answer = recipe.sampling.group_size, recipe.sampling.max_new_tokens
        tokens += shapes.sequences // shapes.rows * group * answer
    wide, mlp = text.hidden_size, text.intermediate_size / tensor
    heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim / tensor
    products = heads + 2 * wide + 2 * mlp  # results of a layer's products
    products *= 1.6 if recipe.model.lora else 1  # with those of adapters beside them
    kept = {"block": wide, "offload": 0, "dots": wide + products, "none": 2 * wide + 3 * products}
    arrays = MODEL_ARRAYS if tensor == 1 else MODEL_ARRAYS_APART
    layer = tokens * item * (MLP_ARRAYS * mlp + arrays * wide)
    weights = wide * (heads + wide / tensor + 3 * mlp)
    head = wide * text.vocab_size / tensor
    # A layer's weights and the next one's; the head; gradients of both where they are trained.
    collected = 2 * item * weights + item * head
    collected += 0 if recipe.model.lora else 2 * item * weights + 4 * head
    logits = 2 * 4 * step.logit_chunk * text.vocab_size / tensor
    saved = text.num_hidden_layers * tokens * item * kept[recipe.model.remat]
    return int(saved + max(layer, logits) + collected)
