"""Checkpoints: exact, kept by policy, refused where they do not fit."""

import contextlib
import json
import os
import pickle
import re
import shutil
import types

import bucket_helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_helpers import stored_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from srpo_jax.learn.optim import OptimConfig, make_optimizer
from srpo_jax.run import checkpoint, checksums, host_state
from srpo_jax.run.checkpoint import CheckpointError, Checkpoints
from srpo_jax.structs import TrainState

# TensorStore reports reads that it gave up through Python's hook for what nobody can catch.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def make_state(seed: int = 0, width: int = 8) -> TrainState:
    rng = np.random.default_rng(seed)
    sharded, whole = NamedSharding(mesh(), P("fsdp")), NamedSharding(mesh(), P())
    params = {
        "text/w/kernel": jax.device_put(rng.normal(size=(width, 4)).astype(np.float32), sharded),
        "text/norm/scale": jax.device_put(rng.normal(size=3).astype(np.float32), whole),
    }
    frozen = {"vision/w/kernel": jax.device_put(jnp.asarray(rng.normal(size=5), "bfloat16"), whole)}
    state = TrainState(
        step=jax.device_put(jnp.int32(seed), whole),
        params=params,
        frozen=frozen,
        opt_state=OPTIMIZER.init(params),
        skipped=jax.device_put(jnp.int32(2), whole),
    )
    updates, opt_state = OPTIMIZER.update(params, state.opt_state, params)
    opt_state = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, whole), opt_state)
    return state.replace(params=optax.apply_updates(params, updates), opt_state=opt_state)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def steps_on_disk(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def test_everything_comes_back_bit_for_bit_and_where_it_lay(tmp_path):
    state = make_state(3)
    saver = Checkpoints(tmp_path)
    pending = {"completions": np.arange(6, dtype=np.int32).reshape(2, 3)}
    saver.save(7, state, config={"lr": 1e-6}, host={"it": b"\0\xff", "n": [1, 2]}, arrays=pending)
    saver.close()

    got = Checkpoints(tmp_path).restore(checkpoint.abstract(make_state(0)))
    assert got.step == 7 and got.meta["config"] == {"lr": 1e-6}
    ((host, arrays),) = got.hosts
    assert host == {"it": b"\0\xff", "n": [1, 2]}
    np.testing.assert_array_equal(arrays["completions"], pending["completions"])
    assert_same(got.state, state)
    assert got.state.params["text/w/kernel"].sharding.spec == P("fsdp")
    mu = got.state.opt_state[1][0].mu["text/w/kernel"]
    assert mu.sharding == state.opt_state[1][0].mu["text/w/kernel"].sharding


def test_saving_and_reading_show_that_they_go_on(tmp_path, monkeypatch):
    shown = []

    @contextlib.contextmanager
    def progress(label):
        shown.append(label)
        yield

    monkeypatch.setattr(checkpoint, "progress", progress)
    saver, state = Checkpoints(tmp_path), make_state(3)
    saver.save(7, state, config={})
    saver.close()
    Checkpoints(tmp_path).restore(checkpoint.abstract(state))
    assert shown[0].startswith("saving step 7") and shown[-1].endswith("checkpoints/7")
    assert set(shown[1:-1]) <= {"writing what was saved"}  # where it was not done by then


@pytest.mark.parametrize(
    ("kind", "dtype"), [("adafactor", "float32"), ("muon", "float32"), ("adamw", "int8")]
)
def test_the_state_of_every_kind_of_optimizer_comes_back(tmp_path, kind, dtype):
    optimizer = make_optimizer(OptimConfig(kind=kind, moment_dtype=dtype), 10)
    names = ("text/layers/mlp/up/kernel", "text/norm/scale")
    params = {name: jnp.ones((2, 128, 128)[: 3 if "up" in name else 1]) for name in names}
    zero = jnp.int32(0)
    state = TrainState(zero, params, {}, optimizer.init(params), zero)
    numbers = iter(range(1, 100))
    state = jax.tree.map(lambda x: x + jnp.asarray(next(numbers), x.dtype), state)
    if dtype == "int8":  # and waits in host memory
        state = state.replace(opt_state=jax.device_put(state.opt_state, jax.memory.Space.Host))
    saver = Checkpoints(tmp_path)
    saver.save(1, state, config={})
    saver.close()
    got = Checkpoints(tmp_path).restore(checkpoint.abstract(state)).state
    assert_same(got, state)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
        assert x.sharding.memory_kind == y.sharding.memory_kind


def test_state_may_be_donated_right_after_save_and_after_restore(tmp_path):
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = make_state(1)
    wanted = jax.tree.map(np.array, state)
    saver = Checkpoints(tmp_path)
    saver.save(1, state, config={})
    bump(state)  # the write may still be going on
    got = saver.restore(checkpoint.abstract(make_state(0)))
    # Of copies: a numpy view of a buffer would keep it from being donated.
    assert_same(jax.tree.map(lambda x: np.asarray(x + 0), got.state), wanted)
    kept = got.state.params["text/w/kernel"]
    bump(got.state)
    assert kept.is_deleted()  # really donated, not copied
    saver.close()


def test_newest_best_and_every_k_are_kept(tmp_path):
    saver = Checkpoints(tmp_path, keep=1, keep_every=4)
    state = make_state()
    for step, metric in ((1, 0.1), (2, 0.9), (3, 0.3), (4, None), (5, 0.5), (6, None)):
        saver.save(step, state, config={})
        if metric is not None:  # a step is evaluated when it is safe
            saver.note(step, metric)
    saver.wait()
    assert steps_on_disk(tmp_path) == [2, 4, 6]
    assert saver.metric(2) == 0.9 and saver.metric(6) is saver.metric(7) is None
    saver.close()

    again = Checkpoints(tmp_path, keep=1)  # the best is known after a restart too
    assert again.best_step() == 2 and again.metric(2) == 0.9
    assert again.restore(state).step == 6  # Orbax reads what was noted beside it
    again.save(7, state, config={})
    again.note(7, 0.95)
    again.save(8, state, config={})
    again.close()
    assert steps_on_disk(tmp_path) == [7, 8]


def test_a_step_is_written_once(tmp_path):
    saver = Checkpoints(tmp_path)
    assert saver.save(1, make_state(1), config={}) is True
    assert saver.save(1, make_state(2), config={}) is False
    assert int(saver.restore(make_state()).state.step) == 1
    saver.close()


def test_half_written_step_is_not_taken(tmp_path):
    saver = Checkpoints(tmp_path)
    saver.save(1, make_state(1), config={})
    saver.close()
    name = "2.orbax-checkpoint-tmp"
    os.makedirs(tmp_path / "checkpoints" / name / "params")
    again = Checkpoints(tmp_path)
    assert again.restore(make_state()).step == 1
    assert checkpoint.find_params(tmp_path).name == "1"
    again.close()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run's folder with the steps 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    saver = Checkpoints(folder)
    for step in (3, 6):
        saver.save(step, make_state(step), config={"n": step}, host={"at": step})
        saver.note(step, step / 10)
    saver.close()
    return folder


def overwrite(file, text: bytes) -> None:
    with open(file, "r+b") as out:
        out.seek(out.seek(0, os.SEEK_END) // 2)
        out.write(text)


def largest(folder):
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def other_step(item: str):
    def replace(step) -> None:
        shutil.rmtree(step / item)
        shutil.copytree(step.parent / "3" / item, step / item)

    return replace


DAMAGE = {
    "an empty folder": (
        lambda step: [shutil.rmtree(path) for path in step.iterdir() if path.is_dir()],
        "params, optimizer, host, meta missing",
    ),
    "an item missing": (lambda step: shutil.rmtree(step / "optimizer"), "6: optimizer missing"),
    "a truncated file": (
        lambda step: os.truncate(largest(step / "params"), 20),
        "6/params: .*not valid for value of size 20",
    ),
    "a bad manifest": (
        lambda step: (step / "optimizer" / "manifest.ocdbt").write_text("x"),
        "6/optimizer: .*manifest",
    ),
    "cut metadata": (lambda step: os.truncate(step / "params" / "_METADATA", 9), "6/params: "),
    "flipped bits": (
        lambda step: overwrite(largest(step / "params"), b"\xff" * 400),
        "6/params: |6: params.* not what was saved",
    ),
    "parameters of another step": (other_step("params"), "6: params.*more are not what was saved"),
    "host state of another step": (other_step("host"), "6: host is not what was saved"),
    "JSON of another step": (other_step("meta"), "6/meta/metadata: is of step 3"),
    "changed JSON": (
        lambda step: overwrite(step / "meta" / "metadata", b"8"),
        "6/meta/metadata: (its text is not|Expecting|Extra|Invalid)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_before_training_and_the_whole_step_before_it_is_named(
    two_steps, tmp_path, kind
):
    shutil.copytree(two_steps, tmp_path / "run")
    break_it, words = DAMAGE[kind]
    break_it(tmp_path / "run" / "checkpoints" / "6")
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path / "run").restore(make_state())
    message = str(error.value)
    assert re.search(f"^step 6 is damaged \\(.*({words})", message), message
    assert "; step 3 is whole: pass --config.checkpoint.fallback=True" in message
    assert "\n" not in message and len(message) < 600


def test_with_fallback_a_run_goes_on_from_the_whole_step_and_may_write_the_damaged_one_anew(
    two_steps, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    (folder / "checkpoints" / "9").mkdir()
    (folder / "checkpoints" / "9" / "params").mkdir()
    os.truncate(largest(folder / "checkpoints" / "6" / "params"), 20)
    saver = Checkpoints(folder)
    got = saver.restore(make_state(), fallback=True)
    assert got.step == 3 and got.hosts[0][0] == {"at": 3} and saver.best_step() == 3
    assert_same(got.state, make_state(3))
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == ["6", "9"]
    assert saver.save(6, make_state(6), config={}) is True
    saver.close()
    assert Checkpoints(folder).restore(make_state()).step == 6


def test_damaged_old_steps_and_steps_without_checksums_do_not_matter(two_steps, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    (folder / "checkpoints" / "3" / "meta" / "metadata").write_text("x")
    file = folder / "checkpoints" / "6" / "meta" / "metadata"
    old = json.loads(file.read_text())
    del old["checksums"], old["seal"]
    file.write_text(json.dumps(old))
    saver = Checkpoints(folder)
    assert saver.best_step() == 6 and saver.restore(make_state()).step == 6


def test_an_empty_newer_folder_is_no_step_and_in_nobodys_way(two_steps, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    (folder / "checkpoints" / "9").mkdir()
    assert checkpoint.find_params(folder).name == "6"
    saver = Checkpoints(folder)
    assert saver.restore(make_state()).step == 6
    assert saver.save(9, make_state(9), config={}) is True
    saver.close()
    assert Checkpoints(folder).restore(make_state()).step == 9


def test_a_run_without_any_whole_step_says_so(two_steps, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    for step in ("3", "6"):
        shutil.rmtree(folder / "checkpoints" / step / "params")
    with pytest.raises(CheckpointError, match="step 6 .*; step 3 .*; no other step is whole"):
        Checkpoints(folder).restore(make_state(), fallback=True)


def test_damaged_parameters_are_no_start_of_another_run(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    other_step("params")(tmp_path / "run" / "checkpoints" / "6")
    with pytest.raises(CheckpointError, match="not what was saved"):
        stored_params(tmp_path / "run")


def test_checksums_are_of_values_and_places_on_any_mesh():
    base = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    devices = NamedSharding(mesh(), P("fsdp")), NamedSharding(mesh(), P(None, "data"))
    arrays = {
        "whole": base,
        "bits": base.view(np.int32),
        "half": jnp.asarray(base, "bfloat16"),
        "bool": base > 0,
        "one": np.int32(3),
    }
    sums = checksums.checksums(jax.tree.map(jnp.asarray, arrays))
    assert sums["whole"] == sums["bits"] and len(set(sums.values())) == 4
    for sharding in devices:
        assert (
            checksums.checksums({"whole": jax.device_put(base, sharding)})["whole"] == sums["whole"]
        )
    for at in ((0, 0), (7, 5), (3, 2)):
        changed = base.copy()
        changed.view(np.uint32)[at] ^= 1 << (at[0] * 4)
        assert checksums.checksums({"whole": jnp.asarray(changed)}) != {"whole": sums["whole"]}
    assert checksums.checksums({"whole": jnp.asarray(base[::-1])}) != {"whole": sums["whole"]}


def test_nothing_is_made_before_the_first_step_is_saved(tmp_path):
    saver = Checkpoints(tmp_path)
    assert saver.latest_step() is None
    saver.wait()
    saver.close()
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    saver = Checkpoints(tmp_path)
    saver.save(1, make_state(), config={})
    saver.wait()

    def fail(_) -> None:
        raise ValueError(
            "RESOURCE_EXHAUSTED: no space\nat all [source locations='a page" + "x" * 9999
        )

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", fail)
        with pytest.raises(CheckpointError, match="could not be written: RESOURCE.* at all$"):
            saver.wait()
        with pytest.raises(CheckpointError, match="could not be written"):
            saver.close()
    saver.close()


def test_the_newest_step_whose_update_was_applied_is_kept_and_gone_back_to(tmp_path):
    saver = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        saver.save(step, make_state(step), config={}, meta={"applied": step < 2})
    saver.note(3, 0.3)
    saver.close()
    assert steps_on_disk(tmp_path) == [1, 3]
    again = Checkpoints(tmp_path, keep=1)
    assert again.applied_step() == 1
    assert_same(again.roll_back(checkpoint.abstract(make_state()), 1).state, make_state(1))
    assert steps_on_disk(tmp_path) == [1] and again.best_step() is None
    assert again.save(3, make_state(4), config={}) is True
    assert again.applied_step() == 3
    again.close()


def test_a_run_on_a_bucket_saves_and_goes_on(tmp_path, monkeypatch):
    bucket = bucket_helpers.mount(monkeypatch, tmp_path)
    saver = Checkpoints(f"{bucket}/run", keep=1)
    for step in (1, 2):
        saver.save(step, make_state(step), config={}, host={"at": step})
    saver.close()
    assert steps_on_disk(tmp_path / "bucket" / "run") == [2]
    again = Checkpoints(f"{bucket}/run")
    assert again.latest_step() == 2
    got = again.restore(make_state())
    assert got.hosts[0][0] == {"at": 2}
    assert_same(got.state, make_state(2))
    assert str(checkpoint.find_params(f"{bucket}/run")) == "gs://bucket/run/checkpoints/2"


def test_other_shapes_and_missing_parameters_are_listed_in_one_error(tmp_path):
    saver = Checkpoints(tmp_path)
    saver.save(1, make_state(), config={})
    other = make_state(width=16)
    other = other.replace(params={**other.params, "text/new": jnp.zeros(2)})
    with pytest.raises(CheckpointError) as error:
        saver.restore(other)
    message = str(error.value)
    assert "text/new" in message and "missing" in message
    assert "(8, 4), wanted (16, 4)" in message
    saver.close()


def test_other_optimizer_is_refused(tmp_path):
    saver = Checkpoints(tmp_path)
    saver.save(1, make_state(), config={})
    state = make_state()
    sgd = state.replace(opt_state=optax.sgd(0.1, momentum=0.9).init(state.params))
    with pytest.raises(CheckpointError, match="does not fit"):
        saver.restore(sgd)
    saver.close()


def test_missing_checkpoint_says_where_it_looked(tmp_path):
    saver = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        saver.restore(make_state())
    saver.close()
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        checkpoint.load_params(tmp_path, {}, {})


def test_what_other_processes_kept_is_there_for_those_that_go_on(tmp_path, monkeypatch):
    held = [({"at": i, "data": {"process_index": i // 2}}, {"x": np.arange(i)}) for i in range(4)]
    packed = [host_state.pack_host(*one) for one in held]
    saver = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(host_state.processes, "gather_bytes", lambda own: packed)
        saver.save(1, make_state(), config={})
    got = saver.restore(make_state()).hosts
    saver.close()
    assert [host for host, _ in got] == [host for host, _ in held]
    assert [len(arrays["x"]) for _, arrays in got] == [0, 1, 2, 3]
    # Two processes had read the same data: of each two one goes on.
    assert [host["data"]["process_index"] for host, _ in host_state.one_a_place(got)] == [0, 1]


@pytest.mark.parametrize("count", [4, 2])
def test_a_state_of_eight_devices_goes_on_on_fewer(tmp_path, count):
    saver = Checkpoints(tmp_path)
    saver.save(1, make_state(5), config={})
    fewer = jax.make_mesh((count,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:count])

    def moved(leaf):
        spec = P("fsdp") if leaf.ndim == 2 else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(fewer, spec))

    like = jax.tree.map(moved, make_state())
    got = saver.restore(like).state
    saver.close()
    assert_same(got, make_state(5))
    assert len(got.params["text/w/kernel"].sharding.device_set) == count


def test_parameters_alone_come_back_sharded_and_cast(tmp_path):
    state = make_state(5)
    params = {**state.params, **state.frozen}
    checkpoint.save_params(tmp_path / "p", params, {"config": {"model": {"width": 8}}})
    assert checkpoint.read_meta(tmp_path / "p")["config"] == {"model": {"width": 8}}
    shardings = {name: x.sharding for name, x in params.items()}
    loaded = checkpoint.load_params(tmp_path / "p", shardings, params)
    assert_same(loaded, jax.tree.map(np.asarray, params))
    cast = checkpoint.load_params(tmp_path / "p", shardings, params, dtype=jnp.bfloat16)
    assert cast["text/w/kernel"].sharding.spec == P("fsdp")
    assert_same(cast, jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), params))


def test_parameters_load_from_a_run_its_newest_step_or_one_step(tmp_path):
    saver = Checkpoints(tmp_path, keep=2)
    for step in (1, 12):
        saver.save(step, make_state(step), config={"n": step})
    saver.close()
    for path, step in ((tmp_path, 12), (tmp_path / "checkpoints" / "1", 1)):
        params = stored_params(path)
        np.testing.assert_array_equal(
            params["text/w/kernel"], np.asarray(make_state(step).params["text/w/kernel"])
        )
        assert "vision/w/kernel" in params
        assert checkpoint.read_meta(path)["config"] == {"n": step}


def test_parameter_names_must_be_the_models(tmp_path):
    state = make_state()
    checkpoint.save_params(tmp_path / "p", state.params, {})
    wanted = {"text/w/kernel": state.params["text/w/kernel"], "text/other": state.step}
    shardings = {name: x.sharding for name, x in wanted.items()}
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_params(tmp_path / "p", shardings, wanted)
    assert "text/other missing" in str(error.value)
    assert "text/norm/scale superfluous" in str(error.value)


def test_parameter_shapes_must_be_the_models(tmp_path):
    state = make_state()
    checkpoint.save_params(tmp_path / "p", state.params, {})
    shardings = {name: x.sharding for name, x in state.params.items()}
    with pytest.raises(CheckpointError, match=r"kernel is \(8, 4\), wanted \(16, 4\)"):
        checkpoint.load_params(tmp_path / "p", shardings, make_state(width=16).params)


def test_host_state_holds_bytes_and_arrays_and_nothing_pickled():
    values, arrays = {"state": b"\x80\x04", "at": [1, {"k": None}]}, {"x": np.ones((2, 2), bool)}
    packed = host_state.pack_host(values, arrays)
    got, got_arrays = host_state.unpack_host(packed)
    assert got == values and got_arrays["x"].dtype == bool
    with pytest.raises(TypeError, match="object"):
        host_state.pack_host({"x": object()}, {})
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        host_state.unpack_host(pickle.dumps(values))


def test_of_two_equal_bests_the_newer_one_is_kept():
    best = checkpoint._KeepBest()
    assert best.step() is None
    best.metrics |= {1: 0.5, 3: 0.7, 4: 0.7, 5: 0.6}
    assert best.step() == 4
    steps = [types.SimpleNamespace(step=n) for n in (3, 4, 5)]
    assert best.should_preserve(steps, context=None) == [False, True, False]
