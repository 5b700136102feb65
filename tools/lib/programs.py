"""The programs of a run, as shapes: what a plan lowers, compiles and counts."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from srpo_jax.learn import optim, steps
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.state import abstract_state, state_shardings
from srpo_jax.model import sharding
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.sampling.sampler import Sampler, SamplingConfig
from srpo_jax.structs import (
    Batch,
    Experience,
    Lanes,
    Rollout,
    TrainState,
    Verdict,
    VisionInputs,
)
from tools.lib.collectives import collective_bytes
from tools.lib.planned import Recipe
from tools.lib.topologies import memory_gib

# (name, function that lowers it, bytes per device that are held beside its arguments)
Lowering = tuple[str, Callable[[], jax.stages.Lowered], int]


def device_bytes(tree: Any) -> int:
    """Bytes on one device of arrays that are given as shapes with shardings."""
    shards = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)


def _over_rows(mesh: Mesh) -> Callable[..., Any]:
    """-> ``array(shape, dtype)``: a ShapeDtypeStruct, leading axis over the data shards.

    (Any: it stands where the steps' structs hold arrays.)
    """
    over_rows = sharding.batch_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=over_rows)

    return array


def abstract_batch(recipe: Recipe) -> Batch:
    """The loader's arrays, with images."""
    array, model, shapes = _over_rows(recipe.mesh), recipe.model, recipe.shapes
    B, T, M, N = shapes.sequences, shapes.tokens, shapes.rows, shapes.patches
    W = model.vision.window_slots
    images = VisionInputs(
        patches=array((M, N, model.vision.patch_dim), jnp.float32),
        patch_hw=array((M, N, 2)),
        window_valid=array((M, N // W, W), jnp.bool_),
        frame_id=array((M, N)),
        merge_src=array((M, N // model.vision.merge_unit)),
    )
    return Batch(
        tokens=array((B, T)),
        segment_ids=array((B, T)),
        mrope=array((B, 3, T)),
        vision_src=array((B, T)),
        lengths=array((B,)),
        next_pos=array((B,)),
        loss_mask=array((B, T), jnp.float32),
        valid=array((B,), jnp.bool_),
        vision=images,
    )


def abstract_experience(recipe: Recipe, step: GrpoConfig, sampling: SamplingConfig) -> Experience:
    """What the update takes, its images as features."""
    array, shapes = _over_rows(recipe.mesh), recipe.shapes
    P, G, R = shapes.sequences, sampling.group_size, sampling.max_new_tokens
    merged = shapes.patches // recipe.model.vision.merge_unit
    width, dtype = recipe.model.vision.out_hidden_size, jnp.dtype(recipe.model.dtype)
    logp = array((P, G, R), jnp.float32)
    rollout = Rollout(
        completions=array((P, G, R)),
        completion_mask=array((P, G, R), jnp.bool_),
        finished=array((P, G), jnp.bool_),
        sample_logp=logp,
        policy_logp=logp,
    )
    features = array((shapes.rows, merged, width), dtype)
    names = [field.name for field in dataclasses.fields(Verdict) if field.name != "own"]
    fields = {name: array((P, G), jnp.bool_) for name in names}
    numbers = ("stated", "first_tokens", "first_end", "total_tokens")
    fields |= {name: array((P, G)) for name in numbers}
    fields["block_tokens"] = array((P, G, 5))
    return Experience(
        batch=dataclasses.replace(abstract_batch(recipe), vision=None),
        rollout=rollout,
        verdict=Verdict(**fields),
        features=features,
        old_logp=logp if step.updates > 1 else None,
        ref_logp=logp if step.needs_reference else None,
        update=array((P,)) if step.updates_per_rollout > 1 else None,
        weight=array((P,), jnp.float32),
        masked=features if step.perception_coef else None,
    )


def abstract_lanes(recipe: Recipe, sampling: SamplingConfig, families: bool = False) -> Lanes:
    """A micro-batch whose completions all fill their budget: the largest there is; on several
    shards these deal prompts out among them. ``families``: first rounds stand once."""
    array, shapes = _over_rows(recipe.mesh), recipe.shapes
    M, per_row = sharding.num_data_shards(recipe.mesh), shapes.sequences // shapes.rows
    prompt = array((M, per_row * shapes.tokens))
    pick = array((M, per_row + 1)) if M > 1 else None
    forks = sampling.forks if families else 1
    lanes, slots = per_row * sampling.group_size // forks, forks * sampling.max_new_tokens
    sample = array((M, lanes, slots))
    runs = (sample, sample) if families else ()
    return Lanes(array((M,)), prompt, prompt, sample, sample, pick, *runs)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def train_inputs(recipe: Recipe, optimizer: optim.Optimizer) -> tuple[Any, dict[str, Any]]:
    """Train state and all parameters in the layout of the update."""
    state = abstract_state(recipe.model, optimizer, freeze=recipe.freeze)
    layout = state_shardings(state, recipe.mesh, offload=recipe.optimizer.offload)
    state = with_shardings(state, layout)
    return state, {**state.frozen, **state.params}


def sft_programs(recipe: Recipe, step: steps.SftConfig) -> Iterator[Lowering]:
    """Every program of an SFT run."""
    transform = optim.make_optimizer(recipe.optimizer, 1000)
    state, _ = train_inputs(recipe, transform)
    batch = abstract_batch(recipe)
    make = steps.make_sft_step(
        recipe.model, step, transform, freeze=recipe.freeze, mesh=recipe.mesh
    )
    yield "sft_step", lambda: make.lower(state, batch, None), 0


def grpo_programs(recipe: Recipe, step: GrpoConfig, sampling: SamplingConfig) -> Iterator[Lowering]:
    """Every program of a GRPO run."""
    model, mesh = recipe.model, recipe.mesh
    transform = optim.make_optimizer(recipe.optimizer, 1000)
    state, params = train_inputs(recipe, transform)
    experience = abstract_experience(recipe, step, sampling)
    reference = reference_bytes(recipe, state)
    resident, held = reference, state
    if recipe.optimizer.offload:  # what waits in host memory; a topology's arrays do not tell
        resident, held = 0, dataclasses.replace(state, opt_state=None)
    # jit drops arguments that a program does not read: the tower's are held beside all but
    # ``encode``, the decoder's beside ``encode``.
    always = device_bytes(held) + resident
    encode = steps.make_encode_step(model, mesh=mesh)
    images = abstract_batch(recipe).vision
    beside = always - device_bytes(_tower(params, True))
    yield "encode", lambda: encode.lower(params, images), beside

    sampler, args = sampler_inputs(recipe, sampling)
    shared = shared_bytes(args["prefill"][0], params)
    beside = always + device_bytes(experience.features) - shared
    for name in args:
        yield name, functools.partial(_lower_sampler, sampler, args, name), beside

    lanes = abstract_lanes(recipe, sampling)
    logps = steps.make_logp_step(model, step, mesh=mesh)
    parts = (experience.rollout.sample_logp, params, experience.batch, experience.rollout)
    parts += (experience.features, lanes)
    beside = always - device_bytes(_tower(params, False))
    yield "logp_step", lambda: logps.lower(*parts), beside + reference - resident
    update = steps.make_grpo_steps(model, step, transform, freeze=recipe.freeze, mesh=mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    ready, total = update.prepare.eval_shape(experience, number)
    lanes = abstract_lanes(recipe, sampling, families=step.shares)
    inputs = (total, state, experience, ready, lanes)
    yield "accumulate", lambda: update.accumulate.lower(*inputs), beside
    beside = resident + device_bytes(experience)
    yield "apply", lambda: update.apply.lower(state, total, ready), beside


def reference_bytes(recipe: Recipe, state: TrainState) -> int:
    """On one device, of the reference model's copy of what is trained, where there is one."""
    if not (isinstance(recipe.step, GrpoConfig) and recipe.step.needs_reference):
        return 0
    return device_bytes({p: _as(leaf, recipe.model.dtype) for p, leaf in state.params.items()})


def sampler_inputs(
    recipe: Recipe, sampling: SamplingConfig
) -> tuple[Sampler, dict[str, tuple[Any, ...]]]:
    """The sampler, and the arguments of its two programs by name; the first are parameters."""
    shapes = recipe.shapes
    model = dataclasses.replace(recipe.model, param_dtype=recipe.model.dtype)
    held = abstract_params(model, "decoder")
    held = with_shardings(held, sharding.param_specs(held, recipe.mesh, "sample"))
    sampler = Sampler(model, sampling, recipe.mesh)
    args = sampler.abstract_args(
        held,
        prompts=shapes.sequences,
        prompt_tokens=shapes.tokens,
        rows=shapes.rows,
        merged_tokens=shapes.patches // model.vision.merge_unit,
    )
    return sampler, {name: args[name] for name in ("prefill", "decode_segment")}


def shared_bytes(sampled: dict[str, Any], params: dict[str, Any]) -> int:
    """Of parameters that sampling takes as they are (`state.relayout`): they are held once."""
    shared = {
        path: leaf
        for path, leaf in sampled.items()
        if path in params
        and leaf.dtype == params[path].dtype
        and leaf.sharding.is_equivalent_to(params[path].sharding, leaf.ndim)
    }
    return device_bytes(shared)


def _lower_sampler(
    sampler: Sampler, args: dict[str, tuple[Any, ...]], name: str
) -> jax.stages.Lowered:
    # Of all widths and windows the widest needs the most.
    slots, window = args["decode_segment"][2][0].done.shape[1], sampler.sampling.max_new_tokens
    programs = {
        "prefill": sampler.prefill,
        "decode_segment": sampler.decode_segment(slots, window),
    }
    with jax.set_mesh(sampler.mesh):
        return programs[name].lower(*args[name])


def _tower(params: dict[str, Any], inside: bool) -> dict[str, Any]:
    """The parameters of the vision tower, or all others."""
    return {path: leaf for path, leaf in params.items() if path.startswith("vision/") is inside}


def _as(leaf: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)


def programs(recipe: Recipe) -> Iterator[Lowering]:
    """Every program of the run."""
    if isinstance(recipe.step, GrpoConfig):
        assert recipe.sampling is not None, "a GRPO recipe says how it samples"
        return grpo_programs(recipe, recipe.step, recipe.sampling)
    return sft_programs(recipe, recipe.step)


# --- compiled ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program and its memory per device in GiB."""

    name: str
    memory: dict[str, float]
    seconds: float
    beside: float  # GiB that the run holds meanwhile
    exchanged: float  # bytes of a call's collectives, per device

    @property
    def total(self) -> float:
        """GiB that must be there."""
        return self.memory["total"] + self.beside


def compile_programs(lowerings: Iterator[Lowering]) -> Iterator[Program]:
    """Compiles one program after the other and reads its memory."""
    for name, lower, beside in lowerings:
        start = time.perf_counter()
        compiled = lower().compile()
        taken, text = time.perf_counter() - start, compiled.as_text() or ""
        yield Program(name, memory_gib(compiled), taken, beside / 2**30, collective_bytes(text))
