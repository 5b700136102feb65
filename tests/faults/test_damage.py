"""Every file of a checkpoint damaged in every way: the step is named, or nothing was lost."""

import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from srpo_jax.run.checkpoint import CheckpointError, Checkpoints
from srpo_jax.structs import TrainState

# TensorStore reports reads that it gave up through Python's hook for what nobody can catch.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(seed: int) -> TrainState:
    rng = np.random.default_rng(seed)
    params = {"text/w": jnp.asarray(rng.normal(size=(32, 16)), "float32")}
    frozen = {"vision/w": jnp.asarray(rng.normal(size=64), "bfloat16")}
    state = optax.adamw(1e-2).init(params)
    return TrainState(jnp.int32(seed), params, frozen, state, jnp.int32(2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The newest of the two steps of a run, 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    saver = Checkpoints(folder)
    for step in (3, 6):
        host = {"data": {"position": 40 * step}}
        arrays = {"completions": np.arange(step, dtype=np.int32)}
        saver.save(step, make_state(step), config={"n": step}, host=host, arrays=arrays)
        saver.note(step, step / 10)
    saver.close()
    return folder / "checkpoints" / "6"


def files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def told(step: Path) -> str:
    """What the run says that would go on from here; "" where it has all that was saved."""
    try:
        got = Checkpoints(step.parents[1]).restore(make_state(0))
    except CheckpointError as error:
        return str(error)
    wanted = make_state(6)
    assert got.step == 6 and got.meta["config"] == {"n": 6} and got.meta["metric"] == 0.6
    ((values, arrays),) = got.hosts
    assert values == {"data": {"position": 240}} and arrays["completions"].tolist() == [*range(6)]
    for one, other in zip(jax.tree.leaves(got.state), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    return ""


def check(words: str, file: Path) -> None:
    """One line that names the damaged step and the whole one."""
    assert re.match(r"step 6 is damaged \(.+; step 3 is whole: pass --config", words), (file, words)
    assert "\n" not in words and len(words) < 600, words


WAYS = {
    "one byte short": lambda data: data[:-1],
    "cut by half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "of zeros": lambda data: bytes(len(data)),
    "another's": lambda data: b"{}",
}


@pytest.mark.parametrize(
    "way", ["removed", *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS)]
)
def test_a_step_with_a_damaged_file_is_named_or_whole_all_the_same(saved, tmp_path, way):
    shutil.copytree(saved.parents[1], tmp_path / "run")
    step, named = tmp_path / "run" / "checkpoints" / "6", 0
    for file in files(step):
        data = file.read_bytes()
        file.unlink()
        if way in WAYS:
            file.write_bytes(WAYS[way](data))
        if words := told(step):
            check(words, file)
            named += 1
        file.write_bytes(data)
    assert named >= 6 and told(step) == ""


def flip_bits(step: Path, count: int) -> int:
    """One at a time, anywhere in any file; how many were told."""
    rng, named = random.Random(6), 0
    for _ in range(count):
        file = rng.choice(files(step))
        data = file.read_bytes()
        if not data:
            continue
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        if words := told(step):
            check(words, file)
            named += 1
        file.write_bytes(data)
    return named


@pytest.mark.parametrize(
    "count", [12, pytest.param(200, marks=pytest.mark.slow)], ids=lambda n: f"{n} flips"
)
def test_no_single_bit_changes_what_is_restored_without_a_word(saved, tmp_path, count):
    shutil.copytree(saved.parents[1], tmp_path / "run")
    named = flip_bits(tmp_path / "run" / "checkpoints" / "6", count)
    print(f"{named} of {count} told, the others changed nothing")
    assert named > count / 4
