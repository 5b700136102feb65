"""One process of test_distributed.py: both loops, stopped on one process and resumed.

    python tests/distributed_run.py INDEX COUNT PORT WORLD WORKDIR

COUNT processes hold 8 / COUNT simulated CPU devices each, as data x fsdp x tensor = 2 x 2 x 2.
With COUNT 1 nothing is interrupted: that is the run to compare with.
"""

import os
import signal
import sys
from pathlib import Path

INDEX, COUNT = int(sys.argv[1]), int(sys.argv[2])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // COUNT}"
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import jax  # noqa: E402
import train_helpers as helpers  # noqa: E402

from srpo_jax import train_grpo, train_sft  # noqa: E402
from srpo_jax.run import rollout, session  # noqa: E402


def prepare(config, world: Path):
    config.compilation_cache_dir = str(world / f"cache{COUNT}_{INDEX}")
    # Adam divides noise by noise where a gradient is nearly 0 (key biases): differences between
    # two orders of summation grow with the learning rate.
    config.optim.lr = 2e-3
    config.eval.file = str(world / "held_out.jsonl")
    config.eval.every = 3
    if COUNT > 1:
        config.distributed.enabled = True
        config.distributed.coordinator = f"localhost:{sys.argv[3]}"
        config.distributed.num_processes = COUNT
        config.distributed.process_id = INDEX
    return config


def stop_after(step: int) -> None:
    """SIGTERM for the last process only, once: the others must stop with it."""
    log, sent = session.Session.log, []

    def wrapped(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step and INDEX == COUNT - 1 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    session.Session.log = wrapped


def run(train, config, workdir: Path) -> None:
    log = session.Session.log
    if COUNT > 1:
        stop_after(config.steps - 1)
        stopped = train(config, workdir)
        assert stopped["step"] == config.steps - 1 and not stopped["finished"], stopped
    ended = train(config, workdir)
    assert ended["step"] == config.steps and ended["finished"], ended
    session.Session.log = log


def main() -> None:
    world, workdir = Path(sys.argv[4]), Path(sys.argv[5])
    paths = {
        "hf_dir": str(world / "hf"),
        "train": str(world / "train.jsonl"),
        "held_out": str(world / "held_out.jsonl"),
    }
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    config = prepare(helpers.sft_config(paths, steps=3, **mesh), world)
    config.export_hf_dir = str(workdir / "hf")
    if "differ" in sys.argv:
        config.optim.lr = float(INDEX)
    run(train_sft.train, config, workdir / "sft")

    rollout.grade = helpers.fake_grade
    config = prepare(helpers.grpo_config(paths, steps=3, **mesh), world)
    config.grpo.kl_coef = 0.1
    config.sampling.group_size = 3
    config.filter.low, config.filter.high = 0.2, 0.8
    run(train_grpo.train, config, workdir / "grpo")
    if COUNT > 1:
        # Which groups share an update, and which wait, depends on the number of processes: here it
        # is only about going on with what each process had waiting.
        config.steps = 2
        config.eval.file = ""
        config.grpo.updates_per_rollout = 2
        config.filter.resample = True
        run(train_grpo.train, config, workdir / "resample")
    assert jax.process_count() == COUNT and jax.device_count() == 8
    print("done", flush=True)


if __name__ == "__main__":
    main()
