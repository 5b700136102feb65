"""What the loop does around its steps: when it saves and evaluates, and which step is the best."""

import functools
import os
import re
import signal
import types

import jax
import numpy as np
import pytest
import train_helpers as helpers

from srpo_jax import train_sft
from srpo_jax.model import sharding
from srpo_jax.run import checkpoint, session
from srpo_jax.run.guard import Stopped
from srpo_jax.run.metrics import read_rows
from srpo_jax.structs import RunError, Stalled, StepFailed


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return helpers.world(tmp_path_factory.mktemp("world"))


def count(state, _):
    return state.replace(step=state.step + 1), {"loss": 0.0}


@pytest.fixture
def train(paths, tmp_path, monkeypatch):
    """``train(steps, every, found)``: stage 1 without arithmetic, kept is one checkpoint.

    ``found`` is what each evaluation finds in turn, or what it raises; it gets shorter by those.
    ``step(state, batch)`` may take the place of the step that only counts; ``changes`` are of the
    configuration.
    """

    monkeypatch.setattr("srpo_jax.run.guard.CompileGuard.watch", lambda _, step: step)

    def run(steps: int, every: int, found: list, step=count, **changes) -> dict:
        make = lambda *_, **__: lambda state, batch, _: step(state, batch)  # noqa: E731
        monkeypatch.setattr(train_sft, "make_sft_step", make)

        def evaluation(params, *, seed):
            now = found.pop(0)
            if isinstance(now, Exception):
                raise now
            return {"acc@2": now}

        evaluation.shown = []
        monkeypatch.setattr(train_sft, "Evaluator", lambda *_: evaluation)
        config = helpers.sft_config(paths, steps=steps)
        config.eval.file, config.eval.every = paths["held_out"], every
        config.checkpoint.every, config.checkpoint.keep = 1000, 1
        config.update_from_flattened_dict(changes)
        return train_sft.train(config, tmp_path / "run")

    return run


def on_disk(tmp_path) -> list[int]:
    return sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())


def evaluated(tmp_path) -> list[tuple[int, float]]:
    rows = read_rows(tmp_path / "run" / "metrics.jsonl", "eval")
    return [(row["step"], row["acc@2"]) for row in rows]


@pytest.mark.usefixtures("train")
def test_epochs_give_the_number_of_steps_of_packed_conversations(paths, tmp_path):
    config = helpers.sft_config(paths, steps=0, fsdp=2, tensor=4)
    config.data.global_batch_size, config.epochs = 20, 2
    row = train_sft.train(config, tmp_path)
    assert row["finished"] and row["step"] == 2 * 40 // 20  # records, of a batch
    # Two of 131 or 132 tokens in 288; on each of two shards five such sequences.
    assert 1 - 264 / 288 <= row["update/padding_share"] <= 1 - 262 / 288


def test_the_best_of_all_evaluations_is_kept_on_whatever_step_it_was(train, tmp_path, capsys):
    row = train(5, 1, [0.2, 0.9, 0.3, 0.4, 0.5])
    assert row["best_step"] == 2 and row["eval"] == {"acc@2": 0.5}
    assert on_disk(tmp_path) == [2, 5]
    assert "best acc@2 0.9000" in capsys.readouterr().out


def test_an_evaluation_that_fails_costs_no_step_and_is_made_up_for_once(train, tmp_path):
    with pytest.raises(RunError, match="no room"):
        train(5, 2, [RunError("no room")])
    assert on_disk(tmp_path) == [2] and evaluated(tmp_path) == []
    found = [0.7, 0.4, 0.6]
    row = train(5, 2, found)
    assert not found and evaluated(tmp_path) == [(2, 0.7), (4, 0.4), (5, 0.6)]
    assert row["best_step"] == 2 and on_disk(tmp_path) == [2, 5]
    assert train(5, 2, [])["best_step"] == 2  # nothing is left to evaluate


def test_a_signal_before_an_evaluation_leaves_it_to_the_next_run(train, tmp_path, monkeypatch):
    log = session.Session.log

    def stop_in_step_2(self, done):
        log(self, done)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "log", stop_in_step_2)
        assert not train(3, 2, [])["finished"]
    found = [0.1, 0.2]
    assert train(3, 2, found)["finished"] and not found
    assert evaluated(tmp_path) == [(2, 0.1), (3, 0.2)]
    meta = checkpoint.read_meta(tmp_path / "run")
    assert meta["step"] == 3 and meta["metric"] == 0.2


# --- stopped early ---


def test_a_step_that_is_given_up_leaves_the_state_the_data_and_the_rows_before_it(train, tmp_path):
    seen = []

    def step(state, batch):
        seen.append(int(batch.tokens.sum()))
        if len(seen) == 3:
            raise Stopped
        return count(state, batch)

    stopped = train(4, 0, [], step)
    assert stopped["step"] == 2 and not stopped["finished"] and on_disk(tmp_path) == [2]
    assert train(4, 0, [0.1], step)["finished"]
    assert seen[2] == seen[3] and len(seen) == 5 and len({*seen}) == 4  # the same batch again
    rows = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_a_step_that_cannot_be_done_saves_what_was_done_before_it_ends_the_run(train, tmp_path):
    calls = []

    def step(state, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise StepFailed("the engine is gone")
        return count(state, batch)

    told = "^the engine is gone; step 1 is saved: run the same command again$"
    with pytest.raises(StepFailed, match=told):
        train(2, 0, [], step)
    assert on_disk(tmp_path) == [1] and train(2, 0, [0.1], step)["finished"]


def test_a_run_that_is_stopped_in_its_last_evaluation_is_not_finished(train, tmp_path, capsys):
    folder = str(tmp_path / "hf")
    stopped = train(2, 2, [Stopped()], export_hf_dir=folder)
    assert stopped["step"] == 2 and not stopped["finished"] and not os.path.exists(folder)
    assert "stopped after step 2 of 2, saved; run the same" in capsys.readouterr().out
    ended = train(2, 2, [0.5], export_hf_dir=folder)
    assert ended["finished"] and ended["eval"] == {"acc@2": 0.5} and os.path.exists(folder)


def test_where_the_data_do_not_come_the_step_before_is_saved_and_the_run_ends(train, tmp_path):
    fails = [True]

    def step(state, batch):
        if int(state.step) == 2 and fails:
            fails.pop()
            raise Stalled("record 7 of train.jsonl did not come")
        return count(state, batch)

    with pytest.raises(Stalled, match="record 7"):
        train(4, 0, [], step)
    assert on_disk(tmp_path) == [2]
    assert train(4, 0, [0.1], step)["finished"]
    rows = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_replicas_that_differ_end_the_run_before_they_are_saved(
    train, tmp_path, monkeypatch, capsys
):
    found = iter(["", "params.w has other bits on device 1 than on device 0"])
    monkeypatch.setattr(session.replicas, "differing", lambda *_: next(found))
    every = {"checkpoint.every": 2, "checkpoint.verify_replicas_every": 2}
    with pytest.raises(
        RunError, match=r"step 4: params.w has .* saved after step 2, which .*run/checkpoints"
    ):
        train(6, 0, [], **every)
    assert on_disk(tmp_path) == [2]
    told = capsys.readouterr().out
    assert "compared every 2 steps" in told
    assert re.findall(r"step (\d): replicas agree \(\d\.\d\d s\)", told) == ["2"]


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices_and_draws_each_record_once(train, monkeypatch, capsys):
    make_mesh, seen, stops = sharding.make_mesh, [], [3, 2]

    def noting(state, batch):
        if int(state.step) in stops[-1:]:
            stops.pop()
            raise Stopped
        seen.extend(np.asarray(batch.tokens)[np.asarray(batch.valid)].tolist())
        return count(state, batch)

    for devices, mesh in (
        (8, {"data": 2, "fsdp": 2, "tensor": 2}),
        (4, {"data": 1, "fsdp": 4, "tensor": 1}),
        (2, {"data": 1, "fsdp": 2, "tensor": 1}),
    ):
        some = functools.partial(make_mesh, **mesh, devices=jax.devices()[:devices])
        monkeypatch.setattr(sharding, "make_mesh", lambda some=some, **_: some())
        changes = {f"mesh.{axis}": size for axis, size in mesh.items()}
        ended = train(5, 0, [0.1], noting, **changes, **{"data.pack": False})
    assert ended["finished"] and len(seen) == len({*map(tuple, seen)}) == 40
    assert capsys.readouterr().out.count("going on elsewhere (mesh were ") == 2


def test_rows_are_written_before_the_step_that_they_are_of_is_saved(train, tmp_path, monkeypatch):
    save, written = checkpoint.Checkpoints.save, []

    def look_then_save(self, step, *args, **kwargs):
        rows = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
        written.append((step, [row["step"] for row in rows]))
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", look_then_save)
    train(4, 0, [0.1], **{"checkpoint.every": 2})
    assert written == [(2, [1, 2]), (4, [1, 2, 3, 4])]


# --- updates that are not finite ---


def broken_from(first: int, until: int, seen: list):
    """A step whose updates ``first`` to ``until`` are not finite, as their numbers in ``seen``."""

    def step(state, batch):
        seen.append(int(batch.tokens.sum()))
        bad = first <= len(seen) <= until
        state = state.replace(skipped=state.skipped + bad, step=state.step + (not bad))
        return state, {"loss": 0.0, "skipped": state.skipped, "update_norm": float(not bad)}

    return step


def test_a_run_goes_back_to_its_last_applied_update_and_on_with_other_data(train, tmp_path, capsys):
    seen = []
    changes = {"checkpoint.every": 1, "optim.max_skipped": 3, "log.every": 1}
    ended = train(6, 0, [0.1], broken_from(3, 5, seen), **changes)
    assert "none of the last 3 updates was finite" in (told := capsys.readouterr().out)
    assert "back to step 2, once, and on with the data after these" in told
    assert ended["finished"] and ended["step"] == 6
    meta = checkpoint.read_meta(tmp_path / "run")
    assert meta["rolled_back"] and meta["applied"]
    assert len(seen) == 9 and len({*seen}) == 9  # three in vain, and no batch twice
    assert ended["skipped"] == 0  # of the state that it went back to


def test_a_run_goes_back_only_once_and_never_where_no_update_was_applied(train, tmp_path):
    changes = {"checkpoint.every": 1, "optim.max_skipped": 2}
    with pytest.raises(RunError, match="none of the last 2 .* had gone back once: go on"):
        train(9, 0, [], broken_from(3, 99, []), **changes)
    assert 2 in on_disk(tmp_path)  # rotation left the last update that was applied


def test_nothing_is_exported_of_a_run_without_one_finite_update(train, tmp_path):
    out = tmp_path / "hf"
    with pytest.raises(RunError, match="none of the 2 updates was finite: export_hf_dir="):
        train(2, 0, [0.1], broken_from(1, 9, []), export_hf_dir=str(out))
    assert not out.exists()


def test_a_device_that_cannot_reach_its_hosts_memory_is_named_with_the_remedy():
    device = types.SimpleNamespace(device_kind="abacus", addressable_memories=lambda: [])
    session.check_offload(False, device)
    session.check_offload(True, jax.local_devices()[0])
    with pytest.raises(RunError, match="^optim.offload=True: abacus cannot .*offload=False$"):
        session.check_offload(True, device)
