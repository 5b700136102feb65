"""Does this recipe fit that cluster? Compiles the real programs ahead of time, without the cluster.

    python -m tools.plan --config=configs/grpo.py:size=7b --topology=tpu:v5p:2x2x2
    python -m tools.plan --config=configs/sft.py:size=7b --topology=cuda:h100:1x8 --mesh=1,8,1
    python -m tools.plan --config=configs/grpo.py:size=7b --topology=cuda:h100:1x8 --estimate
    python -m tools.plan --config=configs/grpo.py:size=7b --topology=tpu:v6e:8x8 --search

Prints, for each program (vision encode, prefill, decode segment, log-probs, one micro-batch of an
update and its end), the memory per device and whether it fits. "beside" is what the run holds while
the program runs although it is no argument of it: the optimizer's moments while sampling, for
instance. Exit code 0 only if everything compiles and fits.

Then an ESTIMATE of a step's time by phase (tools/lib/step_time.py, tools/lib/roofline.py). Useful
FLOPs are those of training's MFU; executed ones are counted from shapes, padding, recomputation and
masked pairs included; bytes are weights, inputs and results of products, caches and logits. What
devices exchange is read from the compiled programs, times the trips of their loops; it is counted
where nothing is compiled. Several slices of a TPU: --topology=tpu:v5p:4x4x4:2 --mesh=2,64,1.

--search tries meshes, prompts per row, remat and LoRA: counts memory, ranks what fits by estimated
time, compiles the best few.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: leave accelerators alone

from srpo_jax.run import compiler
from srpo_jax.run.metrics import peak_flops
from tools.lib import cli, recipes, search
from tools.lib.assumed import parse_lengths
from tools.lib.counted import GIB, Held, count
from tools.lib.programs import Program, compile_programs, programs
from tools.lib.roofline import Rates
from tools.lib.step_time import cost, estimate, table, with_links
from tools.lib.topologies import Topology, describe

# Share of a device's memory that a program may plan with; the rest is the run-time's own.
USABLE = compiler.MEMORY_SHARE
SHOWN = 8  # settings of a search


def report(compiled: Iterator[Program], topology: Topology) -> list[Program]:
    """Prints one line per program, with whether it fits its device."""
    budget = topology.memory_gib * USABLE
    print(f"{topology.name}: {len(topology.devices)} devices, {budget:.1f} GiB usable on each")
    columns = ("arguments", "outputs", "temporaries")
    head = f"{'program':16}" + "".join(f" {c:>11}" for c in (*columns, "beside", "total"))
    print(f"{head}  fits  compiled in")
    found = []
    for p in compiled:
        found.append(p)
        numbers = (*(p.memory[c] for c in columns), p.beside, p.total)
        cells = "".join(f" {number:11.2f}" for number in numbers)
        fits = "yes" if p.total <= budget else "NO"
        print(f"{p.name:16}{cells}  {fits:4}  {p.seconds:.0f} s", flush=True)
    return found


def rates_of(topology: Topology, args: argparse.Namespace) -> Rates:
    """What a device is taken to reach."""
    peak, moving = _peak(topology), args.bandwidth_efficiency
    parts = (topology.bandwidth, topology.links, topology.network)
    return Rates(peak * args.matmul_efficiency, *(part * moving for part in parts))


def _peak(topology: Topology) -> float:
    peak = peak_flops(topology.devices[0].device_kind)
    assert peak, "every topology's devices are in the table"
    return peak


def report_time(
    setting: search.Setting, topology: Topology, compiled: bool, args: argparse.Namespace
) -> None:
    """Prints the estimate of a step's time, with the rates that it rests on."""
    counted = "collectives as compiled" if compiled else "collectives counted"
    slices = f" and {topology.network / 1e9:.1f} GB/s to other slices" * (topology.slices > 1)
    print(
        f"\nESTIMATE of a step, not a measurement: {counted}, nothing of the host; of a device's\n"
        f"{_peak(topology) / 1e12:.0f} TFLOP/s {args.matmul_efficiency:.0%}, of its "
        f"{topology.bandwidth / 1e9:.0f} GB/s of memory, {topology.links / 1e9:.0f} GB/s to other "
        f"devices{slices} {args.bandwidth_efficiency:.0%}"
    )
    devices, rates = len(topology.devices), rates_of(topology, args)
    print(*table(setting.found, rates, _peak(topology), devices), sep="\n")
    if args.price_per_hour:
        seconds = setting.seconds(rates)
        price = cost(seconds, devices, args.price_per_hour)
        print(
            f"1,000 steps: {seconds / 3.6:,.1f} hours of {devices} devices, {price:,.0f} at "
            f"{args.price_per_hour:g} a device and hour"
        )


def report_held(held: Held, usable: float) -> None:
    """Prints what was counted, in GiB."""
    names = ("parameters", "optimizer", "reference", "gradients", "sampler", "batch", "temporaries")
    parts = ", ".join(f"{name} {getattr(held, name) / GIB:.2f}" for name in names)
    print(
        f"COUNTED on a device, in GiB: {parts}; sampling {held.sampling:.1f}, updating "
        f"{held.updating:.1f}, of {usable:.1f} usable: {'yes' if held.most <= usable else 'NO'}"
    )


def plan(config: Any, topology: Topology, args: argparse.Namespace) -> None:
    """One setting: compiled, or with --estimate counted. RuntimeError where it does not fit."""
    recipe = search.recipe_of(config, topology, {})
    print(
        f"{args.config} on a mesh of {', '.join(f'{a}={n}' for a, n in recipe.mesh.shape.items())}"
    )
    usable, held, exchanged = topology.memory_gib * USABLE, count(recipe), {}
    most = held.most
    if held.host:
        told = "its way in each update is not in the estimate"
        print(f"in host memory, of each device: {held.host / GIB:.2f} GiB; {told}")
    if args.estimate:
        report_held(held, usable)
    else:
        found = report(compile_programs(iter(_chosen([*programs(recipe)], args.only))), topology)
        exchanged, most = {p.name: p.exchanged for p in found}, max(p.total for p in found)
    assumed = with_links(estimate(recipe, args.lengths, args.prompt_lengths), exchanged)
    report_time(search.Setting({}, recipe, held, assumed), topology, bool(exchanged), args)
    if most > usable:
        beyond = 0.0 if args.estimate or args.only else most - held.most
        ways = search.remedies(config, topology, usable, beyond)
        advice = "; or ".join(ways) if ways else "none of the settings known here, so more devices"
        raise RuntimeError(f"it does not fit. What would, by count (plan it, too): {advice}")


def _chosen(lowerings: Sequence[Any], only: str) -> Sequence[Any]:
    names, known = only.split(",") if only else [], [name for name, *_ in lowerings]
    for name in set(names) - {*known}:
        raise ValueError(f"--only={only}: no program {name!r}; of {', '.join(known)}")
    return [lowering for lowering in lowerings if not names or lowering[0] in names]


def find(config: Any, topology: Topology, args: argparse.Namespace) -> None:
    """The best settings by count and estimate; of the best, --compile are compiled.

    RuntimeError where none fits.
    """
    usable, rates = topology.memory_gib * USABLE, rates_of(topology, args)
    lengths = (args.lengths, args.prompt_lengths)
    found = [*search.settings(config, topology, usable, lengths)]
    found.sort(key=lambda setting: setting.seconds(rates))
    if not found:
        raise RuntimeError(f"{args.config} fits {topology.name} in no way known here: more devices")
    print(f"{topology.name}: {len(topology.devices)} devices, {usable:.1f} GiB usable on each")
    adapted = [setting for setting in found if "lora.rank" in setting.changes]
    whole = [setting for setting in found if setting not in adapted]
    good = True
    for title, some in (("as the recipe trains", whole), ("with LoRA, another training", adapted)):
        if some:
            print(f"\n{title}: {len(some)} settings fit by count; by estimated seconds of a step")
            good &= _rank(config, some, topology, rates, args)
    if not whole:
        print("\nwithout LoRA none fits by count")
    if not good:
        raise RuntimeError("none of the compiled ones fits: compile more of them (--compile)")


def _rank(
    config: Any,
    found: Sequence[search.Setting],
    topology: Topology,
    rates: Rates,
    args: argparse.Namespace,
) -> bool:
    """Prints the best and compiles some; whether one of these fits."""
    print(*search.ranking(config, found[:SHOWN], rates, args.price_per_hour), sep="\n")
    fits = not args.compile
    for number, setting in enumerate(found[: args.compile], 1):
        print(f"\nnumber {number}, COMPILED: {search.overrides(config, setting.changes)}")
        programs_ = report(compile_programs(programs(setting.recipe)), topology)
        exchanged = {program.name: program.exchanged for program in programs_}
        timed = dataclasses.replace(setting, found=with_links(setting.found, exchanged))
        most, usable = max(p.total for p in programs_), topology.memory_gib * USABLE
        fits |= most <= usable
        print(
            f"{most:.1f} GiB of {usable:.1f} (counted {setting.held.most:.1f}), estimated "
            f"{timed.seconds(rates):.1f} s a step"
        )
    return fits


def main(args: argparse.Namespace) -> None:
    """Read the recipe and the topology; plan one setting, or look for the best."""
    config = recipes.read(args)
    if config.compiler_defaults:
        compiler.prepare()
    topology = describe(args.topology)
    if config.compiler_defaults:
        compiler.tune(topology.devices[0].platform, len(topology.devices))
    if args.mesh:
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = args.mesh
    (find if args.search else plan)(config, topology, args)


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
    parser.add_argument(
        "--topology", required=True, help="tpu:KIND:AxBxC[:SLICES] or cuda:KIND:HOSTSxGPUS"
    )
    parser.add_argument("--mesh", type=mesh_sizes, help="data,fsdp,tensor instead of the config's")
    parser.add_argument("--only", default="", help="names of programs, separated by commas")
    parser.add_argument("--estimate", action="store_true", help="count, compile nothing")
    parser.add_argument("--search", action="store_true", help="rank settings that fit")
    parser.add_argument(
        "--compile",
        type=cli.count,
        default=1,
        metavar="N",
        help="of a search, with and without LoRA: compile the best N (%(default)s)",
    )
    parser.add_argument(
        "--price_per_hour", type=cli.above_zero, metavar="X", help="of a device: what steps cost"
    )
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
