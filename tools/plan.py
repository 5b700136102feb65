"""Does this recipe fit that cluster? Compiles the real programs ahead of time, without the cluster.

    python -m tools.plan --config=configs/grpo.py:size=7b --topology=tpu:v5p:2x2x2
    python -m tools.plan --config=configs/sft.py:size=7b --topology=cuda:h100:1x8 --mesh=1,8,1

Prints, for each program (vision encode, prefill, decode segment, log-probs, update), the memory per
device and whether it fits. "beside" is what the run holds while the program runs although it is no
argument of it: the optimizer's moments while sampling, for instance. Exit code 0 only if everything
compiles and fits.
"""

import argparse
import ast
import dataclasses
import functools
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: leave accelerators alone

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from srpo_jax.learn import optim, steps
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.state import FREEZE_VISION, abstract_state, state_shardings
from srpo_jax.model import sharding
from srpo_jax.model.config import ModelConfig
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.model.sizes import size_config
from srpo_jax.rewards.profiles import profile_named
from srpo_jax.run import setup
from srpo_jax.sampling.sampler import Sampler, SamplingConfig, vision_token_ids
from srpo_jax.structs import Batch, Rollout, Verdict, VisionInputs
from tools.lib import cli
from tools.lib.topologies import Topology, describe, memory_gib

# Share of a device's memory that a program may plan with; the rest is the run-time's own.
USABLE = 0.92
OVERRIDE = "--config."


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Budgets of one update: what the loader would hand to the steps."""

    sequences: int  # P prompts, or SFT conversations, over all devices
    tokens: int  # S, or T for SFT
    rows: int  # M
    patches: int  # N of each row
    group_size: int = 1  # G
    completion: int = 1  # R


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program and its memory per device in GiB."""

    name: str
    memory: dict[str, float]
    seconds: float
    beside: float  # GiB that the run holds meanwhile

    @property
    def total(self) -> float:
        """GiB that must be there."""
        return self.memory["total"] + self.beside


# (name, function that lowers it, bytes per device that are held beside its arguments)
Lowering = tuple[str, Callable[[], jax.stages.Lowered], int]


def device_bytes(tree: Any) -> int:
    """Bytes on one device of arrays that are given as shapes with shardings."""
    shards = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)


def abstract_batch(model: ModelConfig, shapes: Shapes, mesh: Mesh, *, vision: bool) -> Batch:
    """The loader's arrays as ShapeDtypeStructs, leading axis over the data shards."""
    over_rows = sharding.batch_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=over_rows)

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
        vision=images if vision else None,
    )


def _abstract_samples(shapes: Shapes, mesh: Mesh) -> tuple[Rollout, Verdict, jax.ShapeDtypeStruct]:
    """A rollout, its verdict and one log-prob array."""
    over_rows = sharding.batch_sharding(mesh)
    P, G, R = shapes.sequences, shapes.group_size, shapes.completion

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=over_rows)

    logp = array((P, G, R), jnp.float32)
    rollout = Rollout(
        completions=array((P, G, R), jnp.int32),
        completion_mask=array((P, G, R), jnp.bool_),
        finished=array((P, G), jnp.bool_),
        sample_logp=logp,
        policy_logp=logp,
    )
    fields = {f.name: array((P, G), jnp.bool_) for f in dataclasses.fields(Verdict)}
    fields |= {name: array((P, G), jnp.int32) for name in ("first_tokens", "total_tokens")}
    fields["block_tokens"] = array((P, G, 5), jnp.int32)
    return rollout, Verdict(**fields), logp


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _train_inputs(model: ModelConfig, optimizer: optim.Optimizer, mesh: Mesh, freeze: tuple):
    """Train state and all parameters in the layout of the update."""
    state = abstract_state(model, optimizer, freeze=freeze)
    state = _with_shardings(state, state_shardings(state, mesh))
    return state, {**state.frozen, **state.params}


def sft_programs(
    model: ModelConfig,
    shapes: Shapes,
    mesh: Mesh,
    *,
    optimizer: optim.OptimConfig,
    step: steps.SftConfig,
    freeze: tuple[str, ...] = FREEZE_VISION,
) -> Iterator[Lowering]:
    """Every program of an SFT run."""
    transform = optim.make_optimizer(optimizer, 1000)
    state, _ = _train_inputs(model, transform, mesh, freeze)
    batch = abstract_batch(model, shapes, mesh, vision=True)
    make = steps.make_sft_step(model, step, transform, freeze=freeze, mesh=mesh)
    yield "sft_step", lambda: make.lower(state, batch, None), 0


def grpo_programs(
    model: ModelConfig,
    shapes: Shapes,
    mesh: Mesh,
    *,
    optimizer: optim.OptimConfig,
    step: GrpoConfig,
    sampling: SamplingConfig,
    sample_dtype: str | None = "bfloat16",
    freeze: tuple[str, ...] = FREEZE_VISION,
) -> Iterator[Lowering]:
    """Every program of a GRPO run."""
    transform = optim.make_optimizer(optimizer, 1000)
    state, params = _train_inputs(model, transform, mesh, freeze)
    prompts = abstract_batch(model, shapes, mesh, vision=True)
    features = _features(model, shapes, mesh)
    reference = 0
    if step.needs_reference:
        copy = {path: _as(leaf, model.dtype) for path, leaf in state.params.items()}
        reference = device_bytes(copy)
    # jit drops arguments that a program does not read: the tower's are held beside all but
    # ``encode``, the decoder's beside ``encode``.
    always = device_bytes(state) + reference
    encode = steps.make_encode_step(model, mesh=mesh)
    yield (
        "encode",
        lambda: encode.lower(params, prompts.vision),
        (always - device_bytes(_tower(params, True))),
    )

    sample_dtype = sample_dtype or model.param_dtype
    held = abstract_params(dataclasses.replace(model, param_dtype=sample_dtype))
    held = _with_shardings(held, sharding.param_specs(held, mesh, "sample"))
    sampler = Sampler(dataclasses.replace(model, param_dtype=sample_dtype), sampling, mesh)

    def lower_sampler(name: str) -> jax.stages.Lowered:
        args = sampler.abstract_args(
            held,
            prompts=shapes.sequences,
            prompt_tokens=shapes.tokens,
            rows=shapes.rows,
            merged_tokens=shapes.patches // model.vision.merge_unit,
        )
        with jax.set_mesh(mesh):
            return getattr(sampler, name).lower(*args[name])

    # Parameters that sampling takes as they are (`state.relayout`) are held once.
    shared = {
        path: leaf
        for path, leaf in held.items()
        if leaf.dtype == params[path].dtype
        and leaf.sharding.is_equivalent_to(params[path].sharding, leaf.ndim)
    }
    copies = device_bytes(held) - device_bytes(shared)
    beside = always + device_bytes(features) + copies - device_bytes(_tower(held, False))
    for name in ("prefill", "decode_segment"):
        yield name, lambda name=name: lower_sampler(name), beside

    rollout, verdict, logp = _abstract_samples(shapes, mesh)
    text = prompts.replace(vision=None)
    logps = steps.make_logp_step(model, step, mesh=mesh)
    yield (
        "logp_step",
        lambda: logps.lower(params, text, rollout, features),
        (always - device_bytes(_tower(params, False))),
    )
    update = steps.make_grpo_step(model, step, transform, freeze=freeze, mesh=mesh)
    split = step.updates_per_rollout > 1
    chosen = jax.ShapeDtypeStruct(
        (step.micro_batches // step.updates_per_rollout,),
        jnp.int32,
        sharding=sharding.replicated(mesh),
    )
    weight = jax.ShapeDtypeStruct(
        (shapes.sequences,), jnp.float32, sharding=sharding.batch_sharding(mesh)
    )
    yield (
        "grpo_step",
        lambda: update.lower(
            state,
            text,
            rollout,
            verdict,
            features,
            logp if split else None,
            logp if step.needs_reference else None,
            weight,
            chosen if split else None,
        ),
        reference,
    )


def _features(model: ModelConfig, shapes: Shapes, mesh: Mesh) -> jax.ShapeDtypeStruct:
    shape = (shapes.rows, shapes.patches // model.vision.merge_unit, model.vision.out_hidden_size)
    return jax.ShapeDtypeStruct(
        shape, jnp.dtype(model.dtype), sharding=sharding.batch_sharding(mesh)
    )


def _tower(params: dict[str, Any], inside: bool) -> dict[str, Any]:
    """The parameters of the vision tower, or all others."""
    return {path: leaf for path, leaf in params.items() if path.startswith("vision/") is inside}


def _as(leaf: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)


def compile_programs(programs: Iterator[Lowering]) -> Iterator[Program]:
    """Compiles one program after the other and reads its memory."""
    for name, lower, beside in programs:
        start = time.perf_counter()
        memory = memory_gib(lower().compile())
        yield Program(name, memory, time.perf_counter() - start, beside / 2**30)


def report(programs: Iterator[Program], topology: Topology) -> bool:
    """Prints one line per program; True if each fits its device."""
    budget = topology.memory_gib * USABLE
    print(f"{topology.name}: {len(topology.devices)} devices, {budget:.1f} GiB usable on each")
    columns = ("arguments", "outputs", "temporaries")
    head = f"{'program':16}" + "".join(f" {c:>11}" for c in (*columns, "beside", "total"))
    print(f"{head}  fits  compiled in")
    fits = True
    for p in programs:
        good = p.total <= budget
        fits &= good
        numbers = (*(p.memory[c] for c in columns), p.beside, p.total)
        cells = "".join(f" {number:11.2f}" for number in numbers)
        print(f"{p.name:16}{cells}  {'yes' if good else 'NO':4}  {p.seconds:.0f} s", flush=True)
    return fits


# --- from a recipe's configuration -------------------------------------------------------------


def recipe_programs(config: Any, mesh: Mesh) -> Iterator[Lowering]:
    """The programs that `train_sft` or `train_grpo` would run with this configuration.

    Shapes are those of the largest patch budget. Raises ValueError where sizes do not divide.
    """
    model = size_config(config.size, **config.model)
    data, shards = config.data, sharding.num_data_shards(mesh)
    rows = setup.rows_per_shard(
        "data.global_batch_size", data.global_batch_size, data.prompts_per_row, shards
    )
    reinforce = "grpo" in config
    shapes = Shapes(
        sequences=data.global_batch_size,
        tokens=data.prompt_tokens if reinforce else data.tokens,
        rows=rows * shards,
        patches=max(data.patch_budgets),
        group_size=config.sampling.group_size if reinforce else 1,
        completion=config.sampling.max_new_tokens,
    )
    settings = dict(optimizer=setup.optim_config(config.optim), freeze=tuple(config.freeze))
    if not reinforce:
        step = steps.SftConfig(micro_batches=rows, logit_chunk=config.logit_chunk)
        return sft_programs(model, shapes, mesh, step=step, **settings)
    forbidden = vision_token_ids(model)
    section = config.sampling
    sampling = SamplingConfig(
        max_new_tokens=section.max_new_tokens,
        group_size=section.group_size,
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        min_p=section.min_p,
        segment=section.segment,
        concurrent_rows=section.concurrent_rows or None,
        forbidden_ids=forbidden,
    )
    setup.check_updates(
        rows, config.grpo.updates_per_rollout, data.global_batch_size, shards, data.prompts_per_row
    )
    step = GrpoConfig(
        **{k: v or None if k in ("dual_clip", "tis_cap") else v for k, v in config.grpo.items()},
        micro_batches=rows,
        profile=profile_named(config.reward.profile),
        alpha=config.reward.alpha,
        temperature=section.temperature,
        forbidden_ids=forbidden,
        length_cap=section.max_new_tokens,
    )
    return grpo_programs(
        model, shapes, mesh, step=step, sampling=sampling, sample_dtype=model.dtype, **settings
    )


def main(args: argparse.Namespace) -> None:
    """Compile every program of the recipe for the topology and print the table."""
    path, _, arg = args.config.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    config = module.get_config(arg or None)
    for change in args.overrides:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"{OVERRIDE}{change}: write it as {OVERRIDE}{change}=VALUE")
        config.update_from_flattened_dict({key: _parsed(config, key, text)})
    topology = describe(args.topology)
    if args.mesh:
        sizes = [int(n) for n in args.mesh.split(",")]
    else:
        sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    mesh = sharding.make_mesh(*sizes, devices=topology.devices)
    print(f"{args.config} on a mesh of {', '.join(f'{a}={n}' for a, n in mesh.shape.items())}")
    programs = recipe_programs(config, mesh)
    if args.only:
        names = args.only.split(",")
        programs = (program for program in programs if program[0] in names)
    if not report(compile_programs(programs), topology):
        raise RuntimeError(
            "a program does not fit: more devices, a larger mesh.fsdp or mesh.tensor, fewer "
            "data.prompts_per_row, a smaller sampling.concurrent_rows, or bfloat16 parameters"
        )


def _parsed(config: Any, key: str, text: str) -> Any:
    """``text`` as the type that the configuration holds under ``key``."""
    try:
        now = functools.reduce(lambda section, name: section[name], key.split("."), config)
    except KeyError:
        raise ValueError(f"{OVERRIDE}{key}: the configuration has no such key") from None
    if isinstance(now, bool | tuple | list):
        return type(now)(ast.literal_eval(text.capitalize() if isinstance(now, bool) else text))
    return text if now is None else type(now)(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line, without the overrides."""
    example = "python -m tools.plan --config=configs/grpo.py:size=7b --topology=cuda:h100:1x8"
    parser = cli.base_parser(__doc__, example)
    parser.epilog += f"\n\n{OVERRIDE}KEY=VALUE changes the configuration, as in training"
    parser.add_argument("--config", required=True, help="a file of configs/, with its arguments")
    parser.add_argument("--topology", required=True, help="tpu:KIND:AxBxC or cuda:KIND:HOSTSxGPUS")
    parser.add_argument("--mesh", default="", help="data,fsdp,tensor instead of the config's")
    parser.add_argument("--only", default="", help="names of programs, separated by commas")
    parser.add_argument("--workdir", help="ignored: a training command may stand here as it is")
    return parser


if __name__ == "__main__":
    words = sys.argv[1:]
    parser = make_parser()
    overrides = [word.removeprefix(OVERRIDE) for word in words if word.startswith(OVERRIDE)]
    parser.set_defaults(overrides=overrides)
    cli.run(main, parser, [word for word in words if not word.startswith(OVERRIDE)])
