"""Both loops for real on a tiny model, 8 devices as data x fsdp x tensor = 2 x 2 x 2."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_helpers as helpers
from checkpoint_helpers import stored_params
from simulated import xla_flags

from srpo_jax import evaluate, train_grpo, train_sft
from srpo_jax.data.encoders import SftEncoder
from srpo_jax.learn.optim import make_optimizer
from srpo_jax.learn.state import init_state, merge_params
from srpo_jax.learn.steps import make_sft_step
from srpo_jax.model import hf, sharding
from srpo_jax.model.config import load_config
from srpo_jax.rewards.profiles import PAPER
from srpo_jax.run import checkpoint, rollout, session
from srpo_jax.run.command import AGAIN
from srpo_jax.run.feed import open_training
from srpo_jax.run.metrics import read_rows, to_plain
from srpo_jax.run.parts import load_weights, start
from srpo_jax.run.sections import EvaluateSettings, GrpoSettings, SftSettings
from srpo_jax.run.settings import fit_rows, sft_config, sft_settings
from srpo_jax.structs import RunError

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A tiny HF directory and data; compiled programs are shared by the runs of this module."""
    folder = tmp_path_factory.mktemp("world")
    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield helpers.world(folder) | {"cache": str(folder / "cache")}
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def interrupt(monkeypatch, step: int, how):
    """Call ``how`` once, when the loop has done ``step`` and before it saves."""
    log, called = session.Session.log, []

    def wrapped(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step and not called:
            called.append(step)
            how()

    monkeypatch.setattr(session.Session, "log", wrapped)


def crash():
    raise KeyboardInterrupt("power cut")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def final(workdir) -> dict[str, np.ndarray]:
    """Parameters and optimizer moments of the newest checkpoint, by name."""
    folder = checkpoint.find_params(workdir)
    import orbax.checkpoint as ocp

    optimizer = ocp.PyTreeCheckpointer().restore(folder / "optimizer")
    leaves = jax.tree_util.tree_leaves_with_path(optimizer)
    moments = {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}
    return stored_params(folder) | moments


def assert_bit_identical(one, other):
    assert one.keys() == other.keys()
    different = [k for k in one if one[k].tobytes() != other[k].tobytes()]
    assert not different, different


def rl_config(paths, folder):
    """Four steps of stage 2 with all that a checkpoint may have to hold."""
    (folder / "mine.py").write_text(
        "def terms(completions, records):\n"
        "    short = [1 / (1 + len(text)) for text in completions]\n"
        "    wide = [len(record['images']) for record in records]\n"
        "    assert not records[0]['id'].endswith('7'), 'no sevens'\n"
        "    return {'short': short, 'wide': wide}\n"
    )
    one = helpers.grpo_config(paths, steps=4, **MESH)
    one.compilation_cache_dir = paths["cache"]
    one.optim.lr = 1e-2
    one.grpo.kl_coef, one.grpo.kl_in_reward = 0.1, True
    one.grpo.kl_target, one.grpo.ref_every = 0.02, 3
    one.grpo.updates_per_rollout = 2
    one.sampling.group_size = 3
    one.filter.resample = True
    one.filter.low, one.filter.high = 0.2, 0.8
    one.checkpoint.every = 2
    one.reward.function = f"{folder}/mine.py:terms"
    one.reward.weight = "short=0.5,wide=-0.1"
    one.reward.workers = 1
    return one


def numbers(workdir, names) -> list[tuple]:
    rows = read_rows(Path(workdir) / "metrics.jsonl", "train")
    return [(row["step"], *(row[name] for name in names)) for row in rows]


def straight(config, folder) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Stage 1 as a plain loop over batches, without session: metrics, and the last parameters."""
    settings = sft_settings(config, folder)
    with start(settings) as parts:
        encode = SftEncoder(parts.processor, settings.data.target, True)
        settings = fit_rows(settings, parts.shards, parts.processor.geometry.window_slots)
        loader, _ = open_training(settings, parts, encode)
        optimizer = make_optimizer(settings.optim, settings.steps, settings.seed)
        mesh, freeze = parts.mesh, settings.freeze
        weights, _ = load_weights(settings, parts, "float32")
        state = init_state(parts.model, optimizer, freeze=freeze, mesh=mesh, params=weights)
        cfg = sft_config(settings, parts.shards)
        step = make_sft_step(parts.model, cfg, optimizer, freeze=freeze, mesh=mesh)
        rows = []
        for _ in range(settings.steps):
            state, metrics = step(state, sharding.to_global(next(loader).arrays, mesh), None)
            rows.append(to_plain(metrics)[0])
        loader.close()
    return rows, {path: np.asarray(x) for path, x in merge_params(state).items()}


# --- exact resume ------------------------------------------------------------------------------


def test_sft_interrupted_by_a_crash_and_by_sigterm_equals_uninterrupted(
    paths, tmp_path, monkeypatch, capsys
):
    reads = helpers.Reads(monkeypatch, SftSettings)

    def config(**changes):
        one = helpers.sft_config(paths, steps=5, **MESH)
        one.compilation_cache_dir = paths["cache"]
        one.optim.lr = 1e-2
        one.update(changes)
        return one

    whole = train_sft.train(config(export_hf_dir=str(tmp_path / "hf")), tmp_path / "whole")
    assert whole["finished"] and whole["step"] == 5 and np.isfinite(whole["loss"])

    # The interrupted run also evaluates, on other steps than it saves: that must change nothing.
    broken = config(eval={"file": paths["held_out"], "every": 3, "at_start": True})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 4, crash)
        train_sft.train(broken, tmp_path / "broken")
    with monkeypatch.context() as patch:
        interrupt(patch, 4, terminate)  # from the checkpoint of the evaluated step 3
        stopped = train_sft.train(broken, tmp_path / "broken")
    assert stopped["step"] == 4 and not stopped["finished"]
    assert "run the same command again" in capsys.readouterr().out
    ended = train_sft.train(broken, tmp_path / "broken")
    assert ended["finished"] and 0 <= ended["eval"]["acc@2"] <= 1

    assert_bit_identical(final(tmp_path / "whole"), final(tmp_path / "broken"))
    names = ("loss", "grad_norm", "tokens")
    assert numbers(tmp_path / "whole", names) == numbers(tmp_path / "broken", names)
    rows, params = straight(config(), tmp_path)
    assert numbers(tmp_path / "broken", names) == [
        (i + 1, *(row[name] for name in names)) for i, row in enumerate(rows)
    ]
    assert_bit_identical(stored_params(tmp_path / "broken"), params)
    assert len({row["loss"] for row in rows}) == 5

    # Steps are given, the held-out file is no benchmark, and no adapter is trained.
    assert reads.unread(broken) == {"epochs", "eval.scoring", "eval.any_count", "lora.export"}

    # The export is the final state, in HF form.
    exported = hf.load_params(tmp_path / "hf", load_config(tmp_path / "hf"))
    params = stored_params(tmp_path / "whole")
    assert_bit_identical({k: np.asarray(v) for k, v in exported.items()}, params)
    start = hf.load_params(paths["hf_dir"], load_config(paths["hf_dir"]))
    changed = {k for k in params if not np.array_equal(params[k], np.asarray(start[k]))}
    assert changed and not any(k.startswith("vision/") for k in changed)  # frozen by default


def test_grpo_interrupted_equals_uninterrupted_with_carried_groups_and_reference(
    paths, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(rollout, "grade", helpers.fake_grade)
    reads = helpers.Reads(monkeypatch, GrpoSettings)

    def config():
        return rl_config(paths, tmp_path)

    whole = train_grpo.train(config(), tmp_path / "whole")
    assert whole["finished"] and whole["kl"] > 0 and whole["updates"] == 2
    looks = [line for line in capsys.readouterr().out.splitlines() if "preflight: " in line]
    assert len(looks) == 3 and "preflight: sampler and update differ by" in looks[-1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3, crash)
        train_grpo.train(config(), tmp_path / "broken")
    hurried = config()
    hurried.checkpoint.grace_seconds = 0.0
    with monkeypatch.context() as patch:  # the fourth step is given up behind its first grading

        def grade_and_stop(*args, **kwargs):
            terminate()
            return helpers.fake_grade(*args, **kwargs)

        interrupt(patch, 3, lambda: patch.setattr(rollout, "grade", grade_and_stop))
        assert train_grpo.train(hurried, tmp_path / "broken")["step"] == 3
    last = config()
    last.eval.file = paths["held_out"]
    train_grpo.train(last, tmp_path / "broken")
    # What only a benchmark, a judge, an engine, "sapo" or a correction for the sampler reads.
    unread = {f"reward.judge.{key}" for key in last.reward.judge if key != "model"}
    unread |= {f"sampling.engine.{key}" for key in last.sampling.engine if key != "url"}
    unread |= {"eval.scoring", "eval.any_count", "grpo.sapo_negative", "grpo.sapo_positive"}
    unread |= {"lora.export"}  # nothing is exported
    assert reads.unread(last) == unread | {"grpo.tis_floor", "grpo.tis_level"}

    assert_bit_identical(final(tmp_path / "whole"), final(tmp_path / "broken"))
    coefficients = [row[1] for row in numbers(tmp_path / "whole", ("kl_coef",))]
    assert coefficients[0] == 0.1 and len(set(coefficients)) == 4
    names = ("loss", "kl", "kl_coef", "reward/mean", "filter/pending_groups", "filter/rounds")
    names += ("filter/age_mean", "filter/age_max", "filter/dropped_groups", "trained_tokens")
    rows = numbers(tmp_path / "whole", names)
    assert rows == numbers(tmp_path / "broken", names)
    assert any(row[5] > 0 for row in rows[:3])  # groups did wait in the checkpoints
    assert max(row[8] for row in rows) == 1 and all(row[9] == 0 for row in rows)
    for file in sorted((tmp_path / "whole" / "rollouts").iterdir()):
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        for sample in samples:
            failed = sample["id"].endswith("7")
            assert failed == ("no sevens" in sample.get("no_reward", ""))
            assert failed or sample["wide"] == 1.0
            assert not (failed and sample["weight"])
        assert file.read_text() == (tmp_path / "broken" / "rollouts" / file.name).read_text()


@pytest.mark.slow
def test_late_rollouts_are_of_the_step_before_and_go_on_exactly_after_a_stop(
    paths, tmp_path, monkeypatch
):
    monkeypatch.setattr(rollout, "grade", helpers.fake_grade)
    helpers.write_answers(monkeypatch)

    def config():
        one = rl_config(paths, tmp_path)
        one.filter.resample, one.rollouts.late = False, True
        # Also with first rounds that pairs of samples share, and beside masked images.
        one.sampling.group_size, one.sampling.forks, one.grpo.perception_coef = 4, 2, 0.5
        one.optim.moment_dtype, one.optim.offload = "int8", True
        return one

    sample, update = train_grpo.Stage.sample, train_grpo.Stage.update
    seen = []

    def sampled(self, state, loaded, step):
        seen.append(("sampled", step, int(state.step)))
        return sample(self, state, loaded, step)

    def updated(self, state, lesson, packed):
        age = set(np.asarray(lesson.experience.carried).tolist())
        seen.append(("learned", age, int(state.step)))
        return update(self, state, lesson, packed)

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo.Stage, "sample", sampled)
        patch.setattr(train_grpo.Stage, "update", updated)
        whole = train_grpo.train(config(), tmp_path / "whole")
    done = [count for what, _, count in seen if what == "learned"]
    assert [told[:2] for told in seen] == [
        *(("sampled", 0), ("sampled", 1), ("learned", {False})),
        *(("sampled", 2), ("learned", {True}), ("sampled", 3), ("learned", {True})),
        ("learned", {True}),
    ]
    # Step n + 1 is sampled by the very policy that step n begins with.
    assert [count for what, step, count in seen if what == "sampled" and step] == done[:-1]
    assert whole["finished"] and whole["filter/age_mean"] == 1 and whole["ratio/max"] > 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3, crash)
        train_grpo.train(config(), tmp_path / "broken")
    assert train_grpo.train(config(), tmp_path / "broken")["finished"]
    assert_bit_identical(final(tmp_path / "whole"), final(tmp_path / "broken"))
    names = ("loss", "kl", "kl_coef", "reward/mean", "filter/age_mean", "trained_tokens")
    names += ("perception/kl",)
    rows = numbers(tmp_path / "whole", names)
    assert all(row[7] > 0 for row in rows)
    assert rows == numbers(tmp_path / "broken", names) and [row[5] for row in rows] == [0, 1, 1, 1]
    for file in sorted((tmp_path / "whole" / "rollouts").iterdir()):
        assert file.read_text() == (tmp_path / "broken" / "rollouts" / file.name).read_text()


def test_a_run_of_rl_goes_back_to_all_that_the_step_had_begun_with_but_the_data(
    paths, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(rollout, "grade", helpers.fake_grade)
    config = rl_config(paths, tmp_path)
    config.steps, config.optim.max_skipped = 5, 2
    update, seen, asked = train_grpo.Stage.update, [], []

    def watched(self, state, lesson, packed):
        held = {"state": state, "reference": self.reference.params}
        seen.append(jax.tree.map(np.array, held) | {"kl_coef": self.reference.kl_coef})
        asked.append({record.id for one in lesson.rounds for record in one.sampled.records})
        if len(seen) == 4:  # the step after the one that renewed the reference
            weight = lesson.experience.weight * jnp.nan
            experience = dataclasses.replace(lesson.experience, weight=weight)
            lesson = dataclasses.replace(lesson, experience=experience)
        return update(self, state, lesson, packed)

    monkeypatch.setattr(train_grpo.Stage, "update", watched)
    ended = train_grpo.train(config, tmp_path / "run")
    assert "back to step 2, once, and on with the data after these" in capsys.readouterr().out
    assert ended["finished"] and ended["step"] == 5 and ended["skipped"] == 0
    assert ended["update_norm"] > 0 and np.isfinite(ended["loss"])

    begun, again = seen[2], seen[-3]  # the third step, both times
    assert jax.tree.all(jax.tree.map(np.array_equal, begun, again))
    assert asked[2] != asked[-3]
    renewed = seen[3]
    assert renewed["kl_coef"] != begun["kl_coef"]
    assert any((renewed["reference"][k] != x).any() for k, x in begun["reference"].items())
    rows = numbers(tmp_path / "run", ("kl_coef", "update_norm"))
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5] and all(row[2] > 0 for row in rows)


def test_sigterm_from_outside_ends_with_the_code_to_run_again_and_the_command_goes_on(
    paths, tmp_path
):
    command = [
        *(sys.executable, "-m", "srpo_jax.train_sft", "--config=configs/sft.py:size=tiny"),
        *(f"--workdir={tmp_path / 'run'}", f"--config.hf_dir={paths['hf_dir']}"),
        *(f"--config.data.train={paths['train']}", "--config.steps=60"),
        *("--config.data.patch_budgets=(256,)", "--config.data.tokens=256"),
        *("--config.max_pixels=3136", "--config.data.global_batch_size=4"),
        *("--config.data.workers=0", "--config.log.tensorboard=False"),
        *("--config.data.prompts_per_row=4", "--config.checkpoint.every=1000"),
        "--config.log.console=json",
    ]
    environment = os.environ | {"XLA_FLAGS": xla_flags()}

    def start(*more):
        return subprocess.Popen(
            [*command, *more], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    run = start()
    rows = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (rows.exists() and rows.read_text()) and time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    out, error = run.communicate(timeout=240)
    assert run.returncode == AGAIN, error
    assert "SIGTERM: finishing this step" in out and "run the same command again" in out
    told = [json.loads(line) for line in out.splitlines()]  # from the first line to the last
    facts = [one["fact"] for one in told if "fact" in one]
    assert [fact for fact in facts if fact != "compiling"] == [
        *("records", "room", "lengths", "model", "frozen", "devices", "memory", "steps"),
        *("budgets", "changed", "folder", "start", "stopped"),
    ]
    assert {"split", "fact", "note"} >= {next(iter(one)) for one in told} - {"progress"}
    (saved,) = (int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert 1 <= saved < 60

    # Another config is refused in one line, with exit code 1.
    run = start("--config.optim.lr=1.0")
    out, error = run.communicate(timeout=240)
    assert run.returncode == 1 and "Traceback" not in error
    assert "optim.lr was 1e-05, is 1.0" in error.splitlines()[-1]


# --- what a step reports -------------------------------------------------------------------------


def test_grpo_row_has_what_is_promised_and_filtered_groups_teach_nothing(
    paths, tmp_path, monkeypatch
):
    def all_right_in_the_end(*args, **kwargs):
        verdict, details = helpers.fake_grade(*args, **kwargs)
        return verdict.replace(final_correct=np.ones_like(verdict.final_correct)), details

    monkeypatch.setattr(rollout, "grade", all_right_in_the_end)
    config = helpers.grpo_config(paths, steps=2, **MESH)
    config.compilation_cache_dir = paths["cache"]
    config.sampling.group_size = 3
    config.optim.lr = 1e-2
    config.filter.low, config.filter.high = 0.2, 0.8
    row = train_grpo.train(config, tmp_path)
    promised = {
        *("reward/mean", "reward/r_format", "reward/r_acc", "reward/i_eff", "reward/i_ref"),
        *("reward/f_len", "accuracy/first", "accuracy/final", "fix_rate", "harm_rate"),
        *("format_rate", "truncated_share", "groups_without_signal", "block_tokens/reflection"),
        *("time/data", "time/sample", "time/grade", "time/logp", "time/update", "time/step"),
        *("tokens_per_second", "mfu", "filter/kept_share"),
        *("grading/timeouts", "grading/crashes", "grading/unread", "grading/failed"),
    }
    page = (ROOT / "docs/metrics.md").read_text("utf-8").partition("\n|---|---|\n")[2]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    names = {name for cell in rows for name in re.findall("`([^`]+)`", cell)}
    promised |= {name for name in names if "<" not in name}
    assert promised <= row.keys(), promised - row.keys()
    assert row["mfu"] is None  # CPU: the peak is not known
    assert row["updates"] == 0 and row["filter/kept_share"] == 0
    start = hf.load_params(paths["hf_dir"], load_config(paths["hf_dir"]))
    params = stored_params(tmp_path)
    assert all(np.array_equal(params[k], np.asarray(start[k])) for k in params)

    lines = (tmp_path / "rollouts" / "000002.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 8 * 3 and {s["weight"] for s in samples} == {0.0}
    assert len({s["id"] for s in samples}) == 8
    for s in samples:  # what it was asked, and where that stands
        path, _, number = s["origin"].rpartition(":")
        record = json.loads(Path(path).read_text().splitlines()[int(number) - 1])
        asked = {
            "question": record["problem"],
            "images": record["images"],
            "gold": record["answer"],
        }
        assert asked.items() <= s.items() and {"choices", "source"} <= s.keys()
    for p in range(8):
        group = samples[3 * p : 3 * p + 3]
        totals = [s["total"] for s in group]
        mean, std = np.mean(totals), np.std(totals, ddof=1)
        for s, total in zip(group, totals, strict=True):
            wanted = (total - mean) / (std + config.grpo.adv_eps) if std else 0.0
            assert s["advantage"] == pytest.approx(wanted, abs=1e-3)
    mean = np.mean([s["total"] for s in samples])
    assert row["reward/mean"] == pytest.approx(mean, abs=1e-5)
    fixed = sum(s["final_correct"] and not s["first_correct"] for s in samples)
    wrong = sum(not s["first_correct"] for s in samples)
    assert row["fix_rate"] == pytest.approx(fixed / wrong)


def test_a_profile_of_ones_own_rewards_the_training(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "grade", helpers.fake_grade)
    config = helpers.grpo_config(paths, steps=1, **MESH)
    config.compilation_cache_dir = paths["cache"]

    def brief(verdict):
        return {"r_acc": 1.0 / verdict.total_tokens}

    mine = dataclasses.replace(PAPER, name="brief", terms=brief)
    row = train_grpo.train(config, tmp_path, profile=mine)
    samples = [json.loads(s) for s in (tmp_path / "rollouts/000001.jsonl").read_text().splitlines()]
    wanted = [1.0 / s["tokens"] for s in samples]
    assert [s["total"] for s in samples] == pytest.approx(wanted)
    assert row["reward/mean"] == pytest.approx(np.mean(wanted)) and row["updates"] == 1
    with pytest.raises(RunError, match=r"reward\.profile was 'brief', is 'paper'"):
        train_grpo.train(helpers.grpo_config(paths, steps=1, **MESH), tmp_path)


# --- evaluation ----------------------------------------------------------------------------------


def test_evaluation_counts_every_record_and_goes_on_where_it_was_stopped(
    paths, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(rollout, "grade", helpers.fake_grade)
    reads = helpers.Reads(monkeypatch, EvaluateSettings)
    held_out = Path(paths["held_out"]).with_name("mixed.jsonl")  # two more, which cannot be asked
    problem, first, *others = Path(paths["held_out"]).read_text().splitlines()
    long = json.loads(problem) | {"id": "long", "problem": "How many dots? " * 40}
    lost = json.loads(problem) | {"id": "lost", "images": ["nowhere.png"]}
    lines = [problem, json.dumps(long), first, *others, json.dumps(lost)]
    held_out.write_text("\n".join(lines) + "\n")

    def config():
        one = helpers.evaluation_config(paths | {"held_out": str(held_out)}, **MESH)
        one.compilation_cache_dir = paths["cache"]
        one.eval.samples, one.eval.temperature = 2, 1.0
        return one

    whole = evaluate.evaluate(config(), tmp_path / "whole")
    assert reads.unread(config()) == {"eval.scoring", "eval.any_count"}
    told = capsys.readouterr().out
    assert "eval.file: the first 8 of 8 records have" in told
    assert "2 of the first 8 records cannot be used" in told
    assert "mixed.jsonl:2: " in told and "tokens exceed data.prompt_tokens=64; raise it" in told
    assert whole["records"] == 8 and whole["samples"] == 16 and whole["unasked"] == 2
    low, high = whole["interval"]["acc@2"]
    assert 0 <= low <= whole["acc@2"] <= high <= 1
    assert json.loads((tmp_path / "whole" / "summary.json").read_text()) == whole

    append, calls = evaluate.RowLog.append, []

    def stop_after_first(self, rows):
        append(self, rows)
        if not calls:
            calls.append(terminate())

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.RowLog, "append", stop_after_first)
        assert evaluate.evaluate(config(), tmp_path / "broken") is None
    partial = tmp_path / "broken" / "samples.jsonl.partial"
    with open(partial, "a") as file:
        file.write('[{"id": "torn')
    for changes, message in (
        ({"seed": 7}, r"begun with other settings \(seed\)"),
        ({"eval.benchmark": "mathvist"}, "eval.benchmark=mathvist: choose one of"),
    ):
        changed = config()
        changed.update_from_flattened_dict(changes)
        with pytest.raises(RunError, match=message):
            evaluate.evaluate(changed, tmp_path / "broken")
    again = config()  # what changes no sample
    again.data.max_bad_share, again.data.patch_budgets = 0.5, (64, 128)
    assert evaluate.evaluate(again, tmp_path / "broken") == whole
    by_key = lambda row: (row["id"], row["sample"])  # noqa: E731
    one, other = (
        sorted(
            map(json.loads, (tmp_path / d / "samples.jsonl").read_text().splitlines()), key=by_key
        )
        for d in ("whole", "broken")
    )
    assert all(row.pop("seconds") >= 0 for row in one + other)
    assert one == other and not partial.exists()
    unasked = [row for row in one if "reason" in row]
    assert [row["id"] for row in unasked] == ["long", "long", "lost", "lost"]
    assert "exceed data.prompt_tokens=64" in unasked[0]["reason"]
    assert "cannot be read" in unasked[2]["reason"]
    for row in unasked:
        assert not (row["first_correct"] or row["final_correct"] or row["format_ok"])
        assert row["response"] == "" and row["final_answer"] is None and row["gold"]
    asked = [row["final_correct"] for row in one if "reason" not in row]
    assert len(asked) == 12 and whole["acc@2"] == pytest.approx(sum(asked) / 16)
    assert {"prompt", "response", "blocks", "first_answer", "final_answer", "tokens"} <= set(one[0])
    partial.touch()  # a kill between the two: there is nothing left to do
    assert evaluate.evaluate(config(), tmp_path / "broken") == whole and not partial.exists()
    changed = config()
    changed.bootstrap = 7
    with pytest.raises(RunError, match="is there already, of other settings; give another"):
        evaluate.evaluate(changed, tmp_path / "broken")
