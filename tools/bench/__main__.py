"""What each phase of training costs here, against the limit that binds it, and beside its peers.

    python -m tools.bench step --size 43m --prompts 2 --group_size 8 --max_new_tokens 64 --peer trl
    python -m tools.bench update --size 3b --lengths lognormal:870,0.6 --json update.json
    python -m tools.bench all --preset gpu --json docs/measurements/h100.json

Weights are random (--size) or those of --hf_dir. Every line is a median after warm-up: its spread
((slowest - fastest) / median), work per second, FLOP/s and bytes/s of one device, the share of the
limit that binds (matrix products or memory bandwidth, as `machine` finds them in the same run),
padding (slots computed that no token stood in), seconds of compilation, programs compiled after
warm-up (should be 0) and the most memory so far. FLOPs are those of the needed work: recomputation
is not counted. A part that fails is told in one line, the others go on, and the exit code is 1.
"""

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from srpo_jax.data.files import on_bucket, write_json
from srpo_jax.data.hf_folder import hf_folder
from srpo_jax.model import hf
from srpo_jax.model.config import REMAT
from srpo_jax.rewards.verifier import Verifier
from srpo_jax.run import compiler
from tools.bench import host, peers
from tools.bench.measure import Limits, Phase, header, line, machine, measure
from tools.bench.phases import PHASES, Bench
from tools.bench.workload import SHAPES, Workload, make_folder, workload
from tools.lib import cli, loading

HOST = ("load", "data", "grade")
SMOKE = dict(
    size="smoke", prompts=2, group_size=2, prompt_tokens=32, max_new_tokens=8, image="4x4",
    repeats=1,
)  # fmt: skip
# 8 minutes at most on one GPU of 80 GB, compilation included.
GPU = dict(
    size="3b", dtype="bfloat16", remat="dots", prompts=8, group_size=8, prompt_tokens=1024,
    max_new_tokens=512, image="36x36", lengths="lognormal:220,0.6", decode_prompts=[8, 32],
    repeats=3, peer="hf", minutes=7.0, only=[*PHASES],
)  # fmt: skip
REASON_LENGTH = 300  # characters; running out of memory is told in pages


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    out = cli.base_parser(__doc__, "python -m tools.bench all --size 43m --peer hf --json all.json")
    out.prog = "python -m tools.bench"
    add = out.add_argument
    add("what", choices=("machine", *PHASES, *HOST, "all"))
    add("--preset", choices=("gpu",), help="values for the options below: the 3B on one GPU")
    add("--hf_dir", help="Hugging Face directory to measure")
    add("--size", choices=tuple(SHAPES), default="43m", help="random weights (%(default)s)")
    add("--prompts", type=cli.positive, default=2, help="P (%(default)s)")
    add("--group_size", type=cli.positive, default=8, help="G (%(default)s)")
    add("--prompt_tokens", type=cli.positive, default=128, help="S, image included (%(default)s)")
    add("--max_new_tokens", type=cli.positive, default=64, help="R (%(default)s)")
    add("--lengths", default="full", help="full, lognormal:MEAN,SIGMA or a file (%(default)s)")
    add("--image", default="16x16", help="patches of each prompt's image, 0x0: none (%(default)s)")
    add("--prompts_per_row", type=cli.positive, help="of a micro-batch of a device (at most 2)")
    add("--decode_prompts", type=cli.positive, nargs="+", help="all: decode with each of these P")
    add("--only", choices=(*PHASES, *HOST), nargs="+", help="all: these parts, in their order")
    add("--tensor", type=cli.positive, default=1, help="devices that share a copy of the weights")
    add(
        "--dtype",
        choices=loading.DTYPES,
        help="of the arithmetic (float32 on CPU, else bfloat16)",
    )
    add("--param_dtype", choices=loading.DTYPES, help="of the parameters (as --dtype)")
    add("--remat", choices=REMAT, help="what a backward pass recomputes (CPU: none, else block)")
    add("--records", help="data: a file of records, instead of made-up ones")
    add("--repeats", type=cli.positive, default=5, help="timed runs (%(default)s)")
    add("--minutes", type=cli.above_zero, help="begin no part after that")
    add("--peer", choices=tuple(peers.PEERS), help="run it in turn with ours, on the same work")
    add("--peer_python", default=sys.executable, help="the Python that the peer is installed in")
    add("--json", type=cli.output_file, help="write everything there, after each part")
    add("--smoke", action="store_true", help="one repeat of a tiny model: does it run?")
    return out


def parser_for(argv: list[str]) -> argparse.ArgumentParser:
    """The command line, with a preset's values where none was given."""
    named = cli.Parser(add_help=False, allow_abbrev=False)
    named.add_argument("--preset")
    named.add_argument("--smoke", action="store_true")
    found, _ = named.parse_known_args(argv)
    parser = make_parser()
    parser.set_defaults(**((GPU if found.preset else {}) | (SMOKE if found.smoke else {})))
    return parser


class Run:
    """Parts in turn: each is printed and written when it is done."""

    def __init__(self, args: argparse.Namespace, stack: contextlib.ExitStack):
        """What lives as long as ``stack``: a folder, a peer's process, a pool of verifiers."""
        self.args, self.stack, self.start = args, stack, time.monotonic()
        self.place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if on_bucket(args.hf_dir or ""):
            raise ValueError(f"--hf_dir {args.hf_dir}: must lie on a disk, for peers read it, too")
        folder = Path(hf_folder(args.hf_dir)) if args.hf_dir else self.place / "model"
        if not args.hf_dir:
            make_folder(args.size, folder)
        self.work = workload(args, folder, args.prompts)
        self.bench = Bench(self.work)
        self.failed: list[str] = []
        found = machine()
        self.found: dict[str, Any] = {"machine": found}
        flops = found["matmul_flops_per_s"][self.work.model.dtype]
        self.limits = Limits(flops, found["bytes_per_s"])

    def parts(self) -> list[tuple[str, str, int]]:
        """(label, phase, prompts) of what was asked for."""
        args = self.args
        if args.what != "all":
            return [] if args.what == "machine" else [(args.what, args.what, args.prompts)]
        found = []
        for name in args.only or (*PHASES, *HOST):
            many = args.decode_prompts if name == "decode" else None
            for prompts in many or [args.prompts]:
                label = f"decode_{prompts * args.group_size}" if many else name
                found.append((label, name, prompts))
        return found

    def everything(self) -> int:
        """All parts -> the exit code."""
        parts = self.parts()
        for label, name, prompts in parts:
            self.attempt(label, functools.partial(self.part, label, name, prompts))
        for label, name, prompts in parts if self.args.peer else []:  # theirs take longer
            if label in self.found and name in peers.PEERS[self.args.peer]:
                if prompts == self.args.prompts:
                    beside = functools.partial(self.compare, label, name)
                    self.attempt(f"{label}, {self.args.peer}", beside)
        self.save()
        return int(bool(self.failed))

    def attempt(self, label: str, run: Callable[[], None]) -> None:
        """Run a part; where others wait, its failure is one line."""
        limit = self.args.minutes
        if limit and time.monotonic() - self.start > 60 * limit:
            self.failed.append(label)
            print(f"{label}: left out, {limit:g} minutes are over (--minutes)", flush=True)
            return
        try:
            run()
            return
        except Exception as error:
            if self.args.debug or self.args.what != "all":
                raise
            reason = cli.one_line(error)[:REASON_LENGTH]
        self.failed.append(label)
        print(f"{label}: failed: {reason}", flush=True)
        self.bench = Bench(self.work)  # whose arrays may be gone
        gc.collect()

    def part(self, label: str, name: str, prompts: int) -> None:
        """Measure one phase."""
        found = measure(self.phase(name, prompts), self.args.repeats, self.limits)
        self.found[label] = found
        print(line(label, found), flush=True)
        self.save()

    def phase(self, name: str, prompts: int) -> Phase:
        """The phase of that name, with so many prompts."""
        if name == "load":
            return host.load(self.work, self.weights)
        if name == "data":
            return host.data(self.work, self.args.records, self.place / "records")
        if name == "grade":
            return host.grade(self.stack.enter_context(contextlib.closing(Verifier(2))))
        if prompts != self.work.layout.sequences:
            other = workload(self.args, self.work.folder, prompts)
            return PHASES[name](Bench(other, self.bench.state))
        return PHASES[name](self.bench)

    def compare(self, label: str, name: str) -> None:
        """Run the peer in turn with ours."""
        args, run = self.args, self.phase(name, self.args.prompts).run
        found = self.found[label]["peer"] = peers.compare(run, self.peer, name, args.repeats)
        print(peers.line(label, args.peer, found), flush=True)
        self.save()

    @functools.cached_property
    def peer(self) -> peers.Turn:
        """The peer's process."""
        args = (self.args.peer, self.args.peer_python, self.work, self.weights)
        return self.stack.enter_context(peers.start(*args))

    @functools.cached_property
    def weights(self) -> Path:
        """A complete directory of the model; random weights are written first."""
        work, folder = self.work, self.place / "weights"
        if work.has_weights:
            return work.folder
        hf.save_hf(work.params(), work.model, folder, work.folder)
        return folder

    def save(self) -> None:
        """Write what is known by now; of one phase its values stand at the top."""
        if not self.args.json:
            return
        about = {
            "command": "python -m tools.bench " + " ".join(sys.argv[1:]),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "versions": versions(),
            "work": describe(self.args, self.work),
            "failed": self.failed,
        }
        only = {} if self.args.what == "all" else self.found.get(self.args.what, {})
        phases = {"machine": self.found["machine"]} | only if only else self.found
        write_json(self.args.json, about | phases)


def describe(args: argparse.Namespace, work: Workload) -> str:
    """The model and its shapes in words."""
    return f"{args.hf_dir or args.size}: {work.describe()}; lengths {args.lengths}"


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("jax", "jaxlib", "flax", "optax", "transformers", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main(args: argparse.Namespace) -> int:
    """Measure what was asked for, print a line for each phase, write the JSON."""
    if args.peer and args.what not in (*peers.PEERS[args.peer], "all"):
        known = ", ".join(peers.PEERS[args.peer])
        raise ValueError(f"--peer {args.peer} does {known}, not {args.what}")
    if args.peer:  # leave it memory of the GPU
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    compiler.prepare()  # as training does
    compiler.tune(jax.default_backend(), jax.device_count())
    with contextlib.ExitStack() as stack:
        run = Run(args, stack)
        limits = run.found["machine"]
        products = ", ".join(
            f"{flops / 1e12:.2f} TFLOP/s in {dtype}"
            for dtype, flops in limits["matmul_flops_per_s"].items()
        )
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        print(f"{device}: {products}, {limits['bytes_per_s'] / 1e9:.1f} GB/s")
        if args.what != "machine":
            print(f"{describe(args, run.work)}\n{header()}", flush=True)
        return run.everything()


if __name__ == "__main__":
    cli.run(main, parser_for(sys.argv[1:]))
