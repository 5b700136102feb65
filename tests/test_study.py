"""The study: equal compute, jobs that go on, drawn partners, and the page that is filled in."""

import argparse
import json
import threading

import numpy as np
import pyarrow as pa
import pytest

from srpo_jax.data.lock import hold
from tools.demo import partners, tiles
from tools.demo.stages import Clock
from tools.demo.tasks import TASKS
from tools.study import __main__ as study
from tools.study import measure, summary
from tools.study.arms import ARMS, FULL, STARTS, Arm, rl_stage, start_stage
from tools.study.jobs import Job, run_jobs
from tools.study.prepare import cut_to_one_round


def rows(count: int, tokens: float = 100.0) -> list[dict]:
    names = ("accuracy/first", "accuracy/final", "completion_length/mean", "reflected_share")
    row = {"tokens": tokens, "trained_tokens": tokens} | dict.fromkeys(names, 0.5)
    return [row | {"step": i + 1} for i in range(count)]


# --- the second task ---------------------------------------------------------------------------


def test_a_problem_has_one_partner_and_the_written_response_finds_it():
    rng = np.random.default_rng(0)
    first_right = []
    for _ in range(800):
        problem = partners.draw_problem(rng)
        dots = dict(problem.tiles)
        fits = [c for c in dots if c != problem.asked and dots[c] == problem.need]
        assert fits == [problem.answer] and len(dots) == 6
        fields = partners.reflection_fields(problem, rng)
        known, first = dots[problem.asked], fields["first_answer"]
        looked, seen = fields["first_think"].split()[1].split("=")
        right = first == problem.answer
        assert known + int(seen) != problem.total or looked == first  # a look that fits is taken
        said, total, verdict = fields["reflection"].split()
        assert said == f"{first}={dots[first]}" and int(total) == known + dots[first]
        assert verdict == ("yes" if right else "no") and fields["first_correct"] == right
        assert fields["second_answer"] == problem.answer
        if not right:  # each look is true, and only the last fits
            looks = [look.split("=") for look in fields["second_think"].split()]
            assert all(dots[c] == int(n) and c != first for c, n in looks)
            assert [c for c, n in looks if known + int(n) == problem.total] == [looks[-1][0]]
        first_right.append(right)
    assert 0.4 < np.mean(first_right) < 0.65


def test_pictures_of_six_tiles_have_three_rows():
    problems = [partners.draw_problem(np.random.default_rng(i)) for i in range(2)]
    assert tiles.render(problems, np.random.default_rng(0)).shape == (2, 84, 56, 3)
    assert TASKS["partners"].max_pixels == 84 * 56 and TASKS["partners"].patches == 32


def test_the_mix_cuts_right_first_answers_alone():
    table = pa.table(
        {name: ["x"] * 400 for name in ("first_think", "first_answer")}
        | {name: ["y"] * 400 for name in ("reflection", "second_think", "second_answer")}
        | {"first_correct": [True, False] * 200}
    )
    cut = cut_to_one_round(table, seed=3).to_pylist()
    short = [row for row in cut if row["reflection"] is None]
    assert all(
        r["first_correct"] and r["second_answer"] is r["second_think"] is None for r in short
    )
    assert 70 < len(short) < 130 and all(row["first_answer"] == "x" for row in cut)


# --- equal compute -------------------------------------------------------------------------------


def test_what_a_stopped_start_left_is_drawn_anew(tmp_path):
    for left in ("data/rl.jsonl", "init/hf/config.json", "five/hf/config.json"):
        (tmp_path / left).parent.mkdir(parents=True)
        (tmp_path / left).touch()

    def worker(arguments, log):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["five"]

    study.prepare(worker, tmp_path, "partners", 0, quick=True)
    assert (tmp_path / "prepared").exists()


def test_an_arm_goes_on_to_grpos_tokens_and_not_beyond():
    assert measure.steps_within(rows(10), 4_000, most=99) == 20
    assert measure.steps_within(rows(10), 2_000, most=99) == 10
    assert measure.steps_within(rows(10), 1_000, most=99) == 10  # what is spent is spent
    assert measure.steps_within(rows(10), 1e9, most=30) == 30
    grew = [*rows(20, 200.0), *rows(10, 50.0)]  # the last ten say what a step costs now
    assert measure.steps_within(grew, 10_000, most=99) == 40


def test_every_arm_but_grpo_is_stopped_at_its_compute(tmp_path):
    """Arms whose steps cost half as much take twice as many."""
    for name, tokens in (("grpo", 100.0), ("adaptive", 50.0)):
        asked = []

        def worker(arguments, log, name=name, tokens=tokens, asked=asked):
            steps = int(next(a for a in arguments if a.startswith("--config.steps="))[15:])
            asked.append(steps)
            out = tmp_path / name
            out.mkdir(exist_ok=True)
            lines = [json.dumps(row | {"split": "train"}) for row in rows(steps, tokens)]
            (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")

        study.train(worker, tmp_path, "partners", 0, FULL, ARMS[name])
        assert asked == ([50] if name == "grpo" else [25, 100])
        study.train(worker, tmp_path, "partners", 0, FULL, ARMS[name])
        assert len(asked) == 1 + (name != "grpo")  # done before


def test_an_arm_that_was_stopped_past_half_way_still_goes_on_to_grpos_compute(tmp_path):
    """Its rows alone say what is left: it had 30 of the 100 steps that it can pay for."""
    (tmp_path / "grpo.rows.json").write_text(json.dumps(rows(50)))
    (tmp_path / "adaptive").mkdir()

    def write(steps):
        lines = [json.dumps(row | {"split": "train"}) for row in rows(steps, 50.0)]
        (tmp_path / "adaptive/metrics.jsonl").write_text("\n".join(lines) + "\n")

    write(30)
    asked = []

    def worker(arguments, log):
        asked.append(int(next(a for a in arguments if a.startswith("--config.steps="))[15:]))
        write(asked[-1])

    study.train(worker, tmp_path, "partners", 0, FULL, ARMS["adaptive"])
    assert asked == [100]


def test_arms_of_one_start_share_it_and_masked_ones_do_not_imitate_wrong_first_answers(tmp_path):
    assert {arm.start for arm in ARMS.values()} <= set(STARTS)
    for name in STARTS:
        own = start_stage(tmp_path, 0, FULL.plan, TASKS["partners"], name).overrides
        assert own["data.mask_wrong_first"] == ("true" if "masked" in name else "false")
        assert own["data.train"].name == ("mix.parquet" if "mix" in name else "five.parquet")
        assert own.get("data.target") == ("adaptive" if "mix" in name else None)


def test_arms_set_keys_that_there_are_and_others_are_refused(monkeypatch):
    arm = Arm("new", "", {"sampling.nothing": 2})
    monkeypatch.setitem(ARMS, "new", arm)
    with pytest.raises(ValueError, match="--arms new: this version has no key sampling.nothing"):
        study.chosen_arms(["grpo", "new"])
    with pytest.raises(ValueError, match="grpo must be among them"):
        study.chosen_arms(["srpo"])
    with pytest.raises(ValueError, match="--arms other: choose of sft, grpo"):
        study.chosen_arms(["grpo", "other"])
    assert [a.name for a in study.chosen_arms(["grpo", "adaptive"])] == ["grpo", "adaptive"]


def test_settings_are_chosen_on_other_seeds_than_the_test(tmp_path):
    parse = study.make_parser().parse_args
    with pytest.raises(ValueError, match="seeds from 100 on are for --measure validation"):
        study.main(parse(["--workdir", str(tmp_path), "--seeds", "0,100"]))
    with pytest.raises(ValueError, match="those below for --measure test"):
        study.main(parse(["--workdir", str(tmp_path), "--seeds", "3", "--measure", "validation"]))
    assert parse(["--workdir", "x", "--seeds", "0-2,7"]).seeds == [0, 1, 2, 7]


def test_a_folder_is_one_studys_at_a_time(tmp_path):
    args = study.make_parser().parse_args(["--workdir", str(tmp_path), "--seeds", "0"])
    with hold(tmp_path), pytest.raises(RuntimeError, match="in use by process"):
        study.main(args)


def test_no_arm_trains_on_a_schedule_of_its_own_length(tmp_path):
    stages = [
        rl_stage(tmp_path, 0, FULL.plan, TASKS["dot_tiles"], arm, 50)
        for arm in ARMS.values()
        if arm.overrides
    ]
    assert {stage.overrides["optim.schedule"] for stage in stages} == {"constant"}
    assert len({stage.workdir for stage in stages}) == len(stages)


# --- jobs ----------------------------------------------------------------------------------------


def test_jobs_wait_for_what_they_need_and_are_done_once(tmp_path):
    order, lock = [], threading.Lock()

    def job(name: str, *needs: str, fails: bool = False) -> Job:
        def work(_):
            with lock:
                order.append(name)
            if fails:
                raise RuntimeError("broken")
            (tmp_path / name).touch()

        return Job(name, tmp_path / name, work, tuple(tmp_path / need for need in needs))

    jobs = [job("arm", "grpo"), job("grpo", "start"), job("start"), job("bad", fails=True)]
    jobs.append(job("after", "bad"))
    assert run_jobs(jobs, 2, 60, Clock()) == ["bad: broken"]
    assert [name for name in order if name != "bad"] == ["start", "grpo", "arm"]
    order.clear()
    run_jobs(jobs, 1, 60, Clock())
    assert order == ["bad"]


def test_when_the_time_is_over_commands_are_told_to_end(tmp_path):
    code = "import signal,sys,time; signal.signal(15, lambda *_: sys.exit(75)); time.sleep(60)"

    def work(worker):
        worker(["-c", code], tmp_path / "log")

    clock = Clock()
    assert run_jobs([Job("long", tmp_path / "done", work)], 1, 0.5, clock) == []
    assert clock.seconds() < 30 and not (tmp_path / "done").exists()


# --- results -------------------------------------------------------------------------------------


def result(arm: str, seed: int, final: float, tokens: float = 30.0) -> dict:
    sampled = {"acc@1": 0.5, "acc@2": final, "tokens": tokens, "reflected": 1.0}
    sampled |= {"detect": 0.9, "false_alarm": 0.2, "stop": [[12.0, 0.5], [tokens, final]]}
    curve = [{"tokens": 1e6, "accuracy/final": 0.4}, {"tokens": 2e6, "accuracy/final": final}]
    compute = {"steps": 50, "total": 2e6}
    kept = {"task": "partners", "seed": seed, "arm": arm, "compute": compute, "curve": curve}
    return kept | {"sampled": sampled, "greedy": sampled}


def test_the_page_is_filled_in_between_its_markers(tmp_path):
    folder, docs = tmp_path / "results", tmp_path / "docs"
    folder.mkdir()
    docs.mkdir()
    for seed in (0, 1, 2):
        for arm, final in (("grpo", 0.6), ("adaptive", 0.7)):
            one = result(arm, seed, final + 0.01 * seed, 16.0 if arm == "adaptive" else 30.0)
            (folder / f"partners-{seed}-{arm}.json").write_text(json.dumps(one))
    page = docs / "study.md"
    page.write_text("before\n")
    with pytest.raises(ValueError, match="are missing"):
        summary.write(folder, docs)
    page.write_text(f"before\n{summary.BEGIN}\nold\n{summary.END}\nafter\n")
    for _ in range(2):
        summary.write(folder, docs)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| adaptive | 3 | 71.0 ± 2.5 | +10.0 ± 0.0 |") == 1
    # At 18 of 30 tokens it has its whole accuracy; GRPO's is 0.5 there and a third of the rest.
    assert "| 71.0 ± 2.5 | +17.3 ± 1.7 | +10.0 ± 0.0 | 16.0 |" in text
    assert "beyond GRPO's interval: adaptive." in text
    assert len(json.loads((docs / "measurements/study/partners.json").read_text())) == 6
    assert (docs / "measurements/study/partners_tokens.svg").read_text().startswith("<svg")


def test_nothing_is_said_of_the_verdicts_of_a_few_reflections():
    few, many = result("adaptive", 0, 0.7), result("adaptive", 1, 0.7)
    few["sampled"] = few["sampled"] | {"reflected": 0.04, "detect": 1.0}
    assert summary.margin(few) is None and summary.margin(many) == pytest.approx(0.7)
    assert "| +0.70 |" in summary.table({"partners": {"adaptive": {0: few, 1: many}}})
    assert "| 4 | - |" in summary.table({"partners": {"adaptive": {0: few}}})


def test_intervals_are_those_of_students_t_and_one_seed_has_none():
    mean, half = summary.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5, rel=1e-3))
    assert summary.interval([1.0]) == (1.0, None)


def test_what_a_study_runs_is_listed_seed_by_seed(tmp_path):
    args = argparse.Namespace(
        workdir=str(tmp_path), seeds=[0, 1], tasks=["partners"], quick=True, measure="test"
    )
    jobs = study.jobs_of(args, study.chosen_arms(["sft", "grpo", "adaptive"]))
    names = [job.name.removeprefix("partners ") for job in jobs]
    assert names[:3] == ["seed 0: data", "seed 0: SFT, five", "seed 0: SFT, mix"]
    assert names[3:6] == [f"seed 0: {name}" for name in ("sft", "grpo", "adaptive")]
    assert jobs[5].needs == (
        tmp_path / "partners/seed0/prepared",
        tmp_path / "partners/seed0/mix/hf",
        tmp_path / "partners/seed0/grpo.rows.json",
    )
