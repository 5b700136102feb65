"""One process of test_distributed.py: both loops, stopped on one process and resumed.

    python tests/distributed_run.py INDEX COUNT PORT WORLD WORKDIR
        [differ | shared | resample | until=STEP mesh=DATA,FSDP,TENSOR]

COUNT processes hold 8 / COUNT simulated CPU devices each, as data x fsdp x tensor = 2 x 2 x 2.
With COUNT 1 nothing is interrupted: that is the run to compare with. ``differ``: their configs do.
``until``: both loops go to that step, on the devices of ``mesh``; what is there goes on.
``shared``: tensor spans them all, so that they hold the same rows; one step of GRPO, an evaluation.
``resample``: GRPO with groups that wait and move, straight on and stopped.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path

INDEX, COUNT = int(sys.argv[1]), int(sys.argv[2])
os.environ["JAX_PLATFORMS"] = "cpu"
WORDS = dict(word.split("=") for word in sys.argv[6:] if "=" in word)
MESH = {
    axis: int(size)
    for axis, size in zip(
        ("data", "fsdp", "tensor"), WORDS.get("mesh", "2,2,2").split(","), strict=True
    )
}
OWN = 1 if {"shared", "resample"} & {*sys.argv} else math.prod(MESH.values()) // COUNT
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from simulated import xla_flags  # noqa: E402

os.environ["XLA_FLAGS"] = xla_flags(OWN)

import jax  # noqa: E402
import train_helpers as helpers  # noqa: E402

from srpo_jax import evaluate, train_grpo, train_sft  # noqa: E402
from srpo_jax.rewards.verifier import Verifier  # noqa: E402
from srpo_jax.run import rollout, session  # noqa: E402
from srpo_jax.run.pool import Pool  # noqa: E402


def prepare(config, world: Path):
    # Adam divides noise by noise where a gradient is nearly 0 (key biases): differences between
    # two orders of summation grow with the learning rate.
    config.optim.lr = 2e-3
    config.eval.file = str(world / "held_out.jsonl")
    config.eval.every = 3
    return spread(config, world)


def spread(config, world: Path):
    config.compilation_cache_dir = str(world / "cache")
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
    until = int(WORDS.get("until", config.steps - 1 if COUNT > 1 else config.steps))
    if until < config.steps:
        stop_after(until)
        stopped = train(config, workdir)
        assert stopped["step"] == until and not stopped["finished"], stopped
        session.Session.log = log
        if WORDS:
            return
    ended = train(config, workdir)
    assert ended["step"] == config.steps and ended["finished"], ended


def own_reward(world: Path, value: str) -> str:
    """A reward function that gives ``value`` for each text."""
    own = world / f"own{INDEX}.py"
    own.write_text(
        f"import os\ndef mine(completions):\n    return [{value} for text in completions]"
    )
    own.rename(world / "own.py")  # the same of every process
    return f"{world}/own.py:mine"


def share_rows(paths: dict[str, str], world: Path, workdir: Path) -> None:
    """One step and an evaluation; what each process's own check finds differs from the others'."""
    grade, verdicts = rollout.grade, []
    Verifier.check = lambda _, items: [(i + INDEX) % 2 == 0 for i in range(len(items))]

    def recorded(*args, **kwargs):
        verdict, details = grade(*args, **kwargs)
        verdicts.append(verdict.first_correct.tolist())
        return verdict, details

    rollout.grade = recorded
    mesh = {"data": 1, "fsdp": 1, "tensor": COUNT}
    config = spread(helpers.grpo_config(paths, steps=1, **mesh), world)
    config.sampling.max_new_tokens = 4
    config.reward.function = own_reward(world, "float(os.getpid())")
    config.reward.workers = 1
    row = train_grpo.train(config, workdir / "grpo")
    config = spread(helpers.evaluation_config(paths, **mesh), world)
    config.sampling.max_new_tokens = 4
    found = evaluate.evaluate(config, workdir / "eval")
    told = {"verdicts": verdicts, "row": row, "records": found["records"]}
    (workdir / f"told{INDEX}.json").write_text(json.dumps(told))
    print("done", flush=True)


def carry_groups(paths: dict[str, str], world: Path, workdir: Path) -> None:
    """Which groups share an update depends on the number of processes: straight on, and stopped."""

    def uneven_grade(*args, **kwargs):
        verdict, details = helpers.fake_grade(*args, **kwargs)
        if INDEX:  # the first of its two prompts is too easy for all
            verdict.final_correct[:1] = True
        return verdict, details

    rollout.grade = uneven_grade
    config = prepare(helpers.grpo_config(paths, steps=4, data=COUNT, fsdp=1, tensor=1), world)
    config.eval.file = ""
    config.data.global_batch_size, config.data.prompts_per_row = 4, 1
    config.sampling.group_size, config.sampling.max_new_tokens = 3, 4
    config.grpo.updates_per_rollout = 2
    config.reward.function = own_reward(world, "1 / (1 + len(text))")
    config.filter.resample, config.filter.low, config.filter.high = True, 0.2, 0.8
    even_out = Pool.even_out

    def counted(self, mesh, room):
        before = len(self.groups)
        even_out(self, mesh, room)
        print(f"process {INDEX} had {before} groups, has {len(self.groups)}", flush=True)

    Pool.even_out = counted
    train_grpo.train(config, workdir / "straight")
    run(train_grpo.train, config, workdir / "stopped")
    print("done", flush=True)


def main() -> None:
    helpers.compile_once()
    world, workdir = Path(sys.argv[4]), Path(sys.argv[5])
    paths = {
        "hf_dir": str(world / "hf"),
        "train": str(world / "train.jsonl"),
        "held_out": str(world / "held_out.jsonl"),
    }
    if "shared" in sys.argv:
        return share_rows(paths, world, workdir)
    if "resample" in sys.argv:
        return carry_groups(paths, world, workdir)
    config = prepare(helpers.sft_config(paths, steps=3, **MESH), world)
    config.export_hf_dir = str(workdir / "hf")
    if "differ" in sys.argv:
        config.optim.lr = float(INDEX)
    run(train_sft.train, config, workdir / "sft")

    rollout.grade = helpers.fake_grade
    config = prepare(helpers.grpo_config(paths, steps=3, **MESH), world)
    config.grpo.kl_coef = 0.1
    config.sampling.group_size = 3
    config.filter.low, config.filter.high = 0.2, 0.8
    run(train_grpo.train, config, workdir / "grpo")
    assert jax.process_count() == COUNT and jax.device_count() == OWN * COUNT
    print("done", flush=True)


if __name__ == "__main__":
    main()
