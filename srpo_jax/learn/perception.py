"""Images with parts blacked out: what the policy is compared with by ``grpo.perception_coef``."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from srpo_jax.learn.micro_batches import jit_on_mesh, replicated, rows_layout
from srpo_jax.structs import Batch, VisionInputs

View = tuple[Batch, jax.Array | None]  # prompts, and their images' features or none


def make_mask_step(
    black_X: np.ndarray, ratio: float, *, mesh: Mesh | None = None
) -> jax.stages.Wrapped:
    """-> ``mask_step(vision, seed, step) -> vision``: each patch black with probability ``ratio``.

    As in PAPO (arXiv 2507.06448: patches of 14 x 14 pixels, ratio 0.6). Which ones is drawn from
    the numbers ``seed`` and ``step`` and the patch's place in the batch, alike on any devices.
    ``black_X`` are the normalised pixels of a black patch.
    """

    def mask_step(vision: VisionInputs, seed: jax.Array, step: jax.Array) -> VisionInputs:
        key = jax.random.fold_in(jax.random.key(seed), step)
        drawn_MN = jax.random.bernoulli(key, ratio, vision.frame_id.shape)
        masked_MN1 = (drawn_MN & (vision.frame_id >= 0))[..., None]
        patches = jnp.where(masked_MN1, jnp.asarray(black_X), vision.patches)
        return dataclasses.replace(vision, patches=patches)

    rows, one = rows_layout(mesh), replicated(mesh)
    return jit_on_mesh(mask_step, mesh, (rows, one, one), rows)


def side_by_side(features_MND: jax.Array | None, masked: Any) -> jax.Array | None:
    """Features of images and of masked ones [M, N/4, 2 D], so that they are dealt out together."""
    if features_MND is None or masked is None:
        return features_MND
    return jnp.concatenate([features_MND, masked], axis=-1)


def views_of(
    batch: Batch, joint: jax.Array | None, masked_MNX: jax.Array | None, *, on: bool
) -> tuple[View, View | None]:
    """The prompts of a micro-batch with their images and, where ``on``, with masked ones.

    ``joint`` is of `side_by_side`; where it is None, ``masked_MNX`` are patches, to be encoded. The
    second view is None where there are no images.
    """
    vision = batch.vision
    if not on:
        return (batch, joint), None
    if joint is not None:
        features, masked = jnp.split(joint, 2, axis=-1)
        return (batch, features), (batch, masked)
    if masked_MNX is None or vision is None:
        return (batch, None), None
    vision = dataclasses.replace(vision, patches=masked_MNX)
    return (batch, None), (dataclasses.replace(batch, vision=vision), None)
