"""What the loop does around its steps: when it saves and evaluates, and which step is the best."""

import os
import signal

import pytest
import train_helpers as helpers

from srpo_jax import train_sft
from srpo_jax.run import checkpoint, session
from srpo_jax.run.metrics import read_rows
from srpo_jax.structs import RunError


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return helpers.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def train(paths, tmp_path, monkeypatch):
    """``train(steps, every, found)``: stage 1 without arithmetic, kept is one checkpoint.

    ``found`` is what each evaluation finds in turn, or what it raises; it gets shorter by those.
    """

    def make_fake_step(*_, **__):
        return lambda state, *_: (state.replace(step=state.step + 1), {"loss": 0.0})

    monkeypatch.setattr(train_sft, "make_sft_step", make_fake_step)
    monkeypatch.setattr("srpo_jax.run.guard.CompileGuard.watch", lambda _, step: step)

    def run(steps: int, every: int, found: list) -> dict:
        def evaluation(params, *, seed):
            now = found.pop(0)
            if isinstance(now, Exception):
                raise now
            return {"acc@2": now}

        monkeypatch.setattr(train_sft, "Evaluator", lambda *_: evaluation)
        config = helpers.sft_config(paths, steps=steps)
        config.eval.file, config.eval.every = paths["held_out"], every
        config.checkpoint.every, config.checkpoint.keep = 1000, 1
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
