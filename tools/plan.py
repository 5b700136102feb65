"""Does this recipe fit that cluster? Compiles the real programs ahead of time, without the cluster.

    python -m tools.plan --config=configs/grpo.py:size=7b --topology=tpu:v5p:2x2x2
    python -m tools.plan --config=configs/sft.py:size=7b --topology=cuda:h100:1x8 --mesh=1,8,1
    python -m tools.plan --config=configs/grpo.py:size=7b --topology=cuda:h100:1x8 --estimate

Prints, for each program (vision encode, prefill, decode segment, log-probs, one micro-batch of an
update and its end), the memory per device and whether it fits. "beside" is what the run holds while
the program runs although it is no argument of it: the optimizer's moments while sampling, for
instance. Exit code 0 only if everything compiles and fits.

Then an ESTIMATE of a step's time by phase (tools/lib/step_time.py, tools/lib/roofline.py). Useful
FLOPs are those of training's MFU; executed ones are counted from shapes, padding, recomputation and
masked pairs included; bytes are weights, inputs and results of products, caches and logits. What
devices exchange is read from the compiled programs, times the trips of their loops.
"""

import argparse
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: leave accelerators alone

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from srpo_jax.learn import optim, steps
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.state import abstract_state, state_shardings
from srpo_jax.model import sharding
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.run import compiler
from srpo_jax.run.metrics import peak_flops
from srpo_jax.sampling.sampler import Sampler, SamplingConfig
from srpo_jax.structs import Batch, Experience, Lanes, Rollout, Verdict, VisionInputs
from tools.lib import cli, recipes
from tools.lib.assumed import parse_lengths
from tools.lib.collectives import collective_bytes
from tools.lib.planned import Recipe, read_recipe
from tools.lib.roofline import Rates
from tools.lib.step_time import estimate, table, with_links
from tools.lib.topologies import Topology, describe, memory_gib

# Share of a device's memory that a program may plan with; the rest is the run-time's own.
USABLE = compiler.MEMORY_SHARE


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


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _train_inputs(recipe: Recipe, optimizer: optim.Optimizer) -> tuple[Any, dict[str, Any]]:
    """Train state and all parameters in the layout of the update."""
    state = abstract_state(recipe.model, optimizer, freeze=recipe.freeze)
    state = _with_shardings(state, state_shardings(state, recipe.mesh))
    return state, {**state.frozen, **state.params}


def sft_programs(recipe: Recipe, step: steps.SftConfig) -> Iterator[Lowering]:
    """Every program of an SFT run."""
    transform = optim.make_optimizer(recipe.optimizer, 1000)
    state, _ = _train_inputs(recipe, transform)
    batch = abstract_batch(recipe)
    make = steps.make_sft_step(
        recipe.model, step, transform, freeze=recipe.freeze, mesh=recipe.mesh
    )
    yield "sft_step", lambda: make.lower(state, batch, None), 0


def grpo_programs(recipe: Recipe, step: GrpoConfig, sampling: SamplingConfig) -> Iterator[Lowering]:
    """Every program of a GRPO run."""
    model, mesh = recipe.model, recipe.mesh
    transform = optim.make_optimizer(recipe.optimizer, 1000)
    state, params = _train_inputs(recipe, transform)
    experience = abstract_experience(recipe, step, sampling)
    reference = 0
    if step.needs_reference:
        copy = {path: _as(leaf, model.dtype) for path, leaf in state.params.items()}
        reference = device_bytes(copy)
    # jit drops arguments that a program does not read: the tower's are held beside all but
    # ``encode``, the decoder's beside ``encode``.
    always = device_bytes(state) + reference
    encode = steps.make_encode_step(model, mesh=mesh)
    images = abstract_batch(recipe).vision
    beside = always - device_bytes(_tower(params, True))
    yield "encode", lambda: encode.lower(params, images), beside

    lower, held = _sampler_lowering(recipe, sampling)
    # Parameters that sampling takes as they are (`state.relayout`) are held once.
    shared = {
        path: leaf
        for path, leaf in held.items()
        if path in params
        and leaf.dtype == params[path].dtype
        and leaf.sharding.is_equivalent_to(params[path].sharding, leaf.ndim)
    }
    beside = always + device_bytes(experience.features) - device_bytes(shared)
    for name in ("prefill", "decode_segment"):
        yield name, functools.partial(lower, name), beside

    lanes = abstract_lanes(recipe, sampling)
    logps = steps.make_logp_step(model, step, mesh=mesh)
    parts = (experience.rollout.sample_logp, params, experience.batch, experience.rollout)
    parts += (experience.features, lanes)
    beside = always - device_bytes(_tower(params, False))
    yield "logp_step", lambda: logps.lower(*parts), beside
    update = steps.make_grpo_steps(model, step, transform, freeze=recipe.freeze, mesh=mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    ready, total = update.prepare.eval_shape(experience, number)
    lanes = abstract_lanes(recipe, sampling, families=step.shares)
    inputs = (total, state, experience, ready, lanes)
    yield "accumulate", lambda: update.accumulate.lower(*inputs), beside
    beside = reference + device_bytes(experience)
    yield "apply", lambda: update.apply.lower(state, total, ready), beside


def _sampler_lowering(
    recipe: Recipe, sampling: SamplingConfig
) -> tuple[Callable[[str], jax.stages.Lowered], dict[str, Any]]:
    """A function that lowers a program of the sampler by its name, and the sampler's parameters."""
    shapes = recipe.shapes
    model = dataclasses.replace(recipe.model, param_dtype=recipe.model.dtype)
    held = abstract_params(model, "decoder")
    held = _with_shardings(held, sharding.param_specs(held, recipe.mesh, "sample"))
    sampler = Sampler(model, sampling, recipe.mesh)

    def lower(name: str) -> jax.stages.Lowered:
        args = sampler.abstract_args(
            held,
            prompts=shapes.sequences,
            prompt_tokens=shapes.tokens,
            rows=shapes.rows,
            merged_tokens=shapes.patches // model.vision.merge_unit,
        )
        # Of all widths and windows the widest needs the most.
        slots, window = args["decode_segment"][2][0].done.shape[1], sampling.max_new_tokens
        programs = {
            "prefill": sampler.prefill,
            "decode_segment": sampler.decode_segment(slots, window),
        }
        with jax.set_mesh(recipe.mesh):
            return programs[name].lower(*args[name])

    return lower, held


def _tower(params: dict[str, Any], inside: bool) -> dict[str, Any]:
    """The parameters of the vision tower, or all others."""
    return {path: leaf for path, leaf in params.items() if path.startswith("vision/") is inside}


def _as(leaf: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)


def compile_programs(lowerings: Iterator[Lowering]) -> Iterator[Program]:
    """Compiles one program after the other and reads its memory."""
    for name, lower, beside in lowerings:
        start = time.perf_counter()
        compiled = lower().compile()
        taken, text = time.perf_counter() - start, compiled.as_text() or ""
        yield Program(name, memory_gib(compiled), taken, beside / 2**30, collective_bytes(text))


def report(compiled: Iterator[Program], topology: Topology) -> tuple[bool, dict[str, float]]:
    """Prints one line per program; whether each fits its device, and what its calls exchange."""
    budget = topology.memory_gib * USABLE
    print(f"{topology.name}: {len(topology.devices)} devices, {budget:.1f} GiB usable on each")
    columns = ("arguments", "outputs", "temporaries")
    head = f"{'program':16}" + "".join(f" {c:>11}" for c in (*columns, "beside", "total"))
    print(f"{head}  fits  compiled in")
    fits, exchanged = True, {}
    for p in compiled:
        good = p.total <= budget
        fits, exchanged[p.name] = fits and good, p.exchanged
        numbers = (*(p.memory[c] for c in columns), p.beside, p.total)
        cells = "".join(f" {number:11.2f}" for number in numbers)
        print(f"{p.name:16}{cells}  {'yes' if good else 'NO':4}  {p.seconds:.0f} s", flush=True)
    return fits, exchanged


def report_time(
    recipe: Recipe, topology: Topology, exchanged: dict[str, float], args: argparse.Namespace
) -> None:
    """Prints the estimate of a step's time, with the rates that it rests on."""
    peak = peak_flops(topology.devices[0].device_kind)
    assert peak, "every topology's devices are in the table"
    computing, moving = args.matmul_efficiency, args.bandwidth_efficiency
    rates = Rates(peak * computing, topology.bandwidth * moving, topology.links * moving)
    counted = "collectives as compiled" if exchanged else "without collectives but relayout's"
    print(
        f"\nESTIMATE of a step, not a measurement: {counted}, nothing of the host; of a device's\n"
        f"{peak / 1e12:.0f} TFLOP/s {computing:.0%}, of its {topology.bandwidth / 1e9:.0f} GB/s of "
        f"memory and {topology.links / 1e9:.0f} GB/s to other devices {moving:.0%}"
    )
    found = with_links(estimate(recipe, args.lengths, args.prompt_lengths), exchanged)
    print(*table(found, rates, peak, len(topology.devices)), sep="\n")


def programs(recipe: Recipe) -> Iterator[Lowering]:
    """Every program of the run."""
    if isinstance(recipe.step, GrpoConfig):
        assert recipe.sampling is not None, "a GRPO recipe says how it samples"
        return grpo_programs(recipe, recipe.step, recipe.sampling)
    return sft_programs(recipe, recipe.step)


def main(args: argparse.Namespace) -> None:
    """Compile every program of the recipe for the topology and print the table."""
    config = recipes.read(args)
    if config.compiler_defaults:
        compiler.prepare()
    topology = describe(args.topology)
    if config.compiler_defaults:
        compiler.tune(topology.devices[0].platform, len(topology.devices))
    sizes = args.mesh or (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    mesh = sharding.make_mesh(*sizes, devices=topology.devices)
    print(f"{args.config} on a mesh of {', '.join(f'{a}={n}' for a, n in mesh.shape.items())}")
    recipe, fits, exchanged = read_recipe(config, mesh), True, {}
    if not args.estimate:
        lowerings = [*programs(recipe)]
        if args.only:
            names, known = args.only.split(","), [name for name, *_ in lowerings]
            for name in set(names) - {*known}:
                raise ValueError(f"--only={args.only}: no program {name!r}; of {', '.join(known)}")
            lowerings = [lowering for lowering in lowerings if lowering[0] in names]
        fits, exchanged = report(compile_programs(iter(lowerings)), topology)
    report_time(recipe, topology, exchanged, args)
    if not fits:
        raise RuntimeError(
            "a program does not fit: more devices, a larger mesh.fsdp or mesh.tensor, fewer "
            "data.prompts_per_row, a smaller sampling.concurrent_rows, or bfloat16 parameters"
        )


def mesh_sizes(text: str) -> tuple[int, ...]:
    """``type=`` of --mesh: "1,8,1" -> (1, 8, 1)."""
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size == "-1" or size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} must be data,fsdp,tensor, as in 1,8,1")
    return tuple(map(int, sizes))


def make_parser() -> argparse.ArgumentParser:
    """The command line, without the overrides."""
    example = "python -m tools.plan --config=configs/grpo.py:size=7b --topology=cuda:h100:1x8"
    parser = recipes.make_parser(__doc__, example)
    parser.add_argument("--topology", required=True, help="tpu:KIND:AxBxC or cuda:KIND:HOSTSxGPUS")
    parser.add_argument("--mesh", type=mesh_sizes, help="data,fsdp,tensor instead of the config's")
    parser.add_argument("--only", default="", help="names of programs, separated by commas")
    parser.add_argument("--estimate", action="store_true", help="only the time: compile nothing")
    told = "full or lognormal:MEAN,SIGMA, cut off at the budget; default: as in the paper's recipe"
    add = functools.partial(parser.add_argument, type=parse_lengths)
    add("--lengths", help=f"of completions (SFT: of conversations): {told}")
    add("--prompt_lengths", help="of prompts, likewise")
    add = functools.partial(parser.add_argument, type=cli.share, help="of the peak (%(default)s)")
    add("--matmul_efficiency", default=0.4)
    add("--bandwidth_efficiency", default=0.6)
    return parser


if __name__ == "__main__":
    recipes.run(main, make_parser())
