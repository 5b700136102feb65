"""What each phase of training costs here, against the limit that binds it.

    python -m tools.bench step --size 43m --prompts 2 --group_size 8 --max_new_tokens 64
    python -m tools.bench update --size 3b --lengths lognormal:870,0.6 --json update.json
    python -m tools.bench all --preset gpu --json docs/measurements/h100.json

Weights are random (``--size``) or those of ``--hf_dir``. Every line is a median after warm-up, its
spread ((slowest - fastest) / median), work per second, FLOP/s and bytes/s of one device, the share
of the binding limit that was reached (matrix products and memory bandwidth as ``machine`` measures
them in the same run), padding (slots computed that no token stood in), seconds of compilation,
programs compiled after warm-up (should be 0) and the peak memory so far. FLOPs are those of the
needed work: recomputation is not counted. ``decode`` is a whole rollout, prefill included.
"""

import argparse
import importlib.metadata
import sys
from typing import Any

import jax

from srpo_jax.data.files import write_json
from tools.bench import host, peers
from tools.bench.measure import Phase, header, line, machine_limits, measure, result
from tools.bench.phases import PHASES, Bench
from tools.bench.workload import SIZE_NAMES, workload
from tools.lib import cli

HOST = ("load", "data", "grade")
ALL = ("vision", "prefill", "decode", "logprobs", "update", "step")
# One GPU of 80 GB or more: the 3B in bfloat16 at the recipe's shapes, 8 minutes with compilation.
PRESETS: dict[str, dict[str, Any]] = {
    "gpu": dict(
        size="3b", dtype="bfloat16", prompts=8, group_size=8, prompt_tokens=1024,
        max_new_tokens=512, image="36x36", lengths="lognormal:220,0.6", prompts_per_row=2,
    ),
    "cpu": dict(size="43m", prompts=2, group_size=8, prompt_tokens=128, max_new_tokens=64),
}  # fmt: skip


SMOKE = dict(
    size="smoke", prompts=2, group_size=2, prompt_tokens=24, max_new_tokens=8, image="4x4",
    repeats=1,
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "transformers", "torch", "trl")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    out = cli.base_parser(__doc__, "python -m tools.bench all --preset cpu")
    add = out.add_argument
    add("what", choices=("machine", *PHASES, *HOST, "all"))
    add("--preset", choices=tuple(PRESETS), help="values for the options below")
    add("--hf_dir", help="weights (and, for load, data and grade, the tokenizer)")
    add("--size", choices=SIZE_NAMES, default="43m", help="random weights (%(default)s)")
    add("--prompts", type=cli.positive, default=2, help="P (%(default)s)")
    add("--group_size", type=cli.positive, default=8, help="G (%(default)s)")
    add("--prompt_tokens", type=cli.positive, default=128, help="S, image included (%(default)s)")
    add("--max_new_tokens", type=cli.positive, default=64, help="R (%(default)s)")
    add("--image", default="16x16", help="patches of each prompt's image, 0x0: none (%(default)s)")
    add("--lengths", default="full", help="full, lognormal:MEAN,SIGMA or a JSON file (%(default)s)")
    add("--prompts_per_row", type=int, default=0, help="0: at most 2")
    add("--tensor", type=cli.positive, default=1, help="devices that share a copy of the weights")
    add("--dtype", help="of computation (float32 on CPU, bfloat16 elsewhere)")
    add("--param_dtype", help="of the parameters (as --dtype)")
    add("--records", help="for data and grade: a file of records")
    add("--repeats", type=cli.positive, default=5, help="timed runs (%(default)s)")
    add("--peer", choices=tuple(peers.PEERS), help="run it in turn with ours, on the same work")
    add("--json", help="write everything there")
    add("--smoke", action="store_true", help="one repeat of a tiny model: does it run?")
    return out


def parser_for(argv: list[str]) -> argparse.ArgumentParser:
    """The command line, with a preset's values where none was given."""
    parser = make_parser()
    named, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS.get(named.preset or "", {}), **(SMOKE if named.smoke else {}))
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure what was asked for, print a line for each phase, write the JSON."""
    work = workload(args)
    limits, machine = machine_limits(work.model.dtype)
    device = jax.devices()[0].device_kind
    print(
        f"{jax.device_count()} x {device}: {limits.flops / 1e12:.2f} TFLOP/s in products of "
        f"{work.model.dtype}, {limits.bytes / 1e9:.1f} GB/s"
    )
    found: dict[str, Any] = {"machine": machine}
    if args.what != "machine":
        print(f"{work.describe()}\n{header()}", flush=True)
        names = ALL if args.what == "all" else (args.what,)
        bench = Bench(work)
        for name in names:
            phase = host.phase(name, args) if name in HOST else PHASES[name](bench)
            found[name] = show(phase, args, limits)
            if args.peer and (args.what == name or name in peers.PEERS[args.peer]):
                found[name]["peer"] = peers.compare(args.peer, name, phase.run, work, args)
    if args.json:
        about = {
            "command": "python -m tools.bench " + " ".join(sys.argv[1:]),
            "device": device,
            "devices": jax.device_count(),
            "versions": versions(),
            "work": work.describe(),
        }
        one = found.get(args.what, {})
        write_json(args.json, {"seconds": one.get("seconds", machine["seconds"]), **about, **found})


def show(phase: Phase, args: argparse.Namespace, limits: Any) -> dict[str, Any]:
    """Measure one phase and print its line."""
    found = result(phase, measure(phase.run, args.repeats), limits, jax.device_count())
    print(line(phase.name, found), flush=True)
    return found


if __name__ == "__main__":
    cli.run(main, parser_for(sys.argv[1:]))
