"""tools.bench: the work it makes, what it tells of a phase and of a peer, what a failure leaves."""

import argparse
import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from srpo_jax.learn.lanes import slots_and_tokens
from srpo_jax.model import sharding
from tools.bench import __main__ as bench
from tools.bench import measure, peers
from tools.bench.phases import PHASES, Bench
from tools.bench.workload import draw_lengths, make_folder, workload
from tools.lib import cli

LIMITS = measure.Limits(flops=100.0, bytes=10.0)
MACHINE = {"seconds": [1.0], "matmul_flops_per_s": {"float32": 1.0}, "bytes_per_s": 1.0}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Of the simulated ones."""
    mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", mesh)


def arguments(*words: str) -> argparse.Namespace:
    return bench.parser_for(list(words)).parse_args(words)


def smoke(folder: Path, *words: str):
    args = arguments("step", "--smoke", "--prompts=4", "--prompts_per_row=2", *words)
    return workload(args, make_folder("smoke", folder / "model"), args.prompts)


# --- the work ----------------------------------------------------------------------------------


def test_lengths_are_full_log_normal_or_those_of_a_file(tmp_path):
    assert (draw_lengths("full", (2, 3), 7) == 7).all()
    drawn = draw_lengths("lognormal:220,0.6", (64, 64), 10_000)
    assert drawn.mean() == pytest.approx(220, rel=0.03)
    assert np.log(drawn).std() == pytest.approx(0.6, rel=0.03)
    assert draw_lengths("lognormal:220,0.6", (64, 64), 300).max() == 300
    file = tmp_path / "lengths"
    rows = "\n".join(json.dumps({"tokens": n, "text": "[1,\u2028"}) for n in (3, 1, 4))
    for text in ("3\n1\n4\n", "[3,\n1, 4]", rows):
        file.write_text(text)
        assert draw_lengths(str(file), (2, 2), 9).tolist() == [[3, 1], [4, 3]]


def test_prompts_fill_their_budget_and_completions_have_the_wanted_lengths(tmp_path):
    work = smoke(tmp_path, "--lengths=lognormal:4,0.8")
    assert len(set(work.lengths_PG.flat)) > 2
    batch, (tokens, mask) = work.batch(), work.completions()
    assert set(batch.lengths) <= {work.prompt_tokens, work.prompt_tokens - 1}
    assert (batch.vision_src >= 0).sum(1).tolist() == [4] * 4 and batch.vision.patches.shape[0] == 2
    np.testing.assert_array_equal(mask.sum(-1), work.lengths_PG)
    assert (tokens[mask] < min(work.processor.forbidden_ids)).all()
    lanes = Bench(work).host_lanes
    assert slots_and_tokens(lanes)[1] == batch.lengths.sum() + work.lengths_PG.sum()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths=lognormal:4"], "--lengths lognormal:4: write lognormal:MEAN,SIGMA"),
        (["--lengths=long"], "--lengths long: full, lognormal:MEAN,SIGMA, or a file"),
        (["--lengths=README.md"], "README.md: for --lengths it must hold numbers"),
        (["--prompts=3"], "3 prompts are no multiple of data shards x --prompts_per_row = 1 x 2"),
        (["--image=5x4"], "--image 5x4: ROWSxCOLUMNS of patches, both even"),
        (["--prompt_tokens=8"], "--prompt_tokens 8: the image and the template take"),
    ],
)
def test_work_that_makes_no_sense_is_named_in_one_line(words, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        smoke(tmp_path, *words).batch()
    assert "\n" not in str(error.value)


def test_a_preset_gives_values_where_none_is_given():
    args = arguments("all", "--preset=gpu", "--repeats=1")
    assert (args.size, args.peer, args.decode_prompts, args.repeats) == ("3b", "hf", [8, 32], 1)
    assert arguments("all").size == "43m"


# --- what is told ------------------------------------------------------------------------------


def test_a_phase_is_told_by_the_median_after_warm_up_and_the_limit_that_binds(monkeypatch):
    runs, clock = [], iter([9.0, 9.0, 4.0, 3.0, 2.0])
    monkeypatch.setattr(measure, "stopwatch", lambda run: run() or next(clock))
    devices = jax.device_count()
    phase = measure.Phase(
        lambda: runs.append(1), "tokens", 50, flops=50.0 * devices, bytes=4.0,
        padding=lambda: 0.25, aside=lambda: 1.0, parts=lambda: {"update": float(len(runs))},
    )  # fmt: skip
    found = measure.measure(phase, 3, LIMITS)
    assert found["seconds"] == [3.0, 2.0, 1.0] and len(runs) == 5
    assert (found["median"], found["spread"], found["tokens_per_s"]) == (2.0, 1.0, 25.0)
    assert (found["flops_per_s"], found["bytes_per_s"]) == (25.0, 2.0)
    assert (found["bound_by"], found["of_limit"]) == ("flops", 0.25)  # 0.5 s, and 0.4 s for bytes
    assert (found["padding_share"], found["parts"], found["recompiles"]) == (0.25, {"update": 4}, 0)
    assert "25.0%" in measure.line("decode", found) and "25% flops" in measure.line("it", found)


def test_programs_compiled_after_warm_up_are_counted():
    sizes = iter(range(1, 9))
    phase = measure.Phase(lambda: jax.jit(lambda x: x + 1)(np.zeros(next(sizes))), "tokens", 1)
    found = measure.measure(phase, 3, LIMITS)
    assert found["recompiles"] == 3 and found["compile_seconds"] > 0


def test_a_peer_runs_in_turn_with_ours_and_is_compared_pair_by_pair(monkeypatch):
    turns, ours, theirs = [], iter([5.0, 1.0, 2.0, 4.0]), iter([9.0, 3.0, 3.0, 4.0])
    monkeypatch.setattr(peers, "stopwatch", lambda run: turns.append("ours") or next(ours))
    peer = lambda phase: turns.append(phase) or next(theirs)  # noqa: E731
    found = peers.compare(lambda: None, peer, "update", 3)
    assert turns == ["ours", "update"] * 4  # the first turn of each warms up
    assert found["ratios"] == [3.0, 1.5, 1.0] and found["ratio"] == 1.5
    line = peers.line("update", "hf", found)
    assert line == (
        "update, ours | hf: 1.00 | 3.00 s = 3.00x, 2.00 | 3.00 s = 1.50x, 4.00 | 4.00 s = 1.00x; "
        "median 1.50x"
    )


def test_a_slow_peer_is_asked_less_often(monkeypatch):
    monkeypatch.setattr(peers, "stopwatch", lambda run: 1.0)
    found = peers.compare(lambda: None, lambda phase: 25.0, "decode", 9)
    assert found["ratios"] == [25.0, 25.0]  # 25, 51, 77 seconds spent; 60 are enough


def test_a_peer_gets_the_same_work_and_its_failure_is_its_last_line(tmp_path, monkeypatch):
    work, program = smoke(tmp_path, "--lengths=lognormal:4,0.8"), tmp_path / "peer.py"
    monkeypatch.setattr(peers, "PROGRAM", program)
    program.write_text(
        "import json, os, pathlib, sys\n"
        "place = pathlib.Path(sys.argv[2])\n"
        "task = json.loads((place / 'task.json').read_text())\n"
        "images = len(list(place.glob('*.png')))\n"
        "assert input() == 'update' and images == len(task['messages']), images\n"
        "os.close(0)  # nobody reads the next question\n"
        "print('a word')\n"
        "print('seconds', sum(task['lengths']), flush=True)\n"
        "import no_such_peer\n"
    )
    with peers.start("hf", sys.executable, work, tmp_path) as peer:
        assert peer("update") == work.lengths_PG.sum()
        remedy = "No module named 'no_such_peer' in .*: install it there, .*--peer_python"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"the peer hf failed: .*{remedy}"):
                peer("update")


def test_the_others_go_on_where_a_part_fails_and_what_is_done_is_written(
    tmp_path, monkeypatch, capsys
):
    def fails(_: Bench) -> measure.Phase:
        raise RuntimeError("RESOURCE_EXHAUSTED:\nout of\nmemory " + "x" * 999)

    monkeypatch.setattr(bench, "machine", lambda: MACHINE)
    monkeypatch.setitem(PHASES, "vision", fails)
    monkeypatch.setitem(PHASES, "update", lambda _: measure.Phase(lambda: None, "tokens", 5))
    words = ["all", "--smoke", "--only", "vision", "update", f"--json={tmp_path / 'it.json'}"]
    with pytest.raises(SystemExit) as stop:
        cli.run(bench.main, bench.parser_for(words), words)
    assert stop.value.code == 1
    (failure,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("vision:")]
    assert failure.startswith("vision: failed: RESOURCE_EXHAUSTED: out of memory")
    assert len(failure) < 400
    found = json.loads((tmp_path / "it.json").read_text())
    assert found["failed"] == ["vision"] and found["update"]["tokens_per_s"] > 0
    with pytest.raises(SystemExit) as stop:  # one part alone fails as every command does
        cli.run(bench.main, bench.parser_for(["vision", "--smoke"]), ["vision", "--smoke"])
    assert stop.value.code == 1 and capsys.readouterr().err.startswith("error: RESOURCE_EXHAUSTED")


def test_a_phase_that_the_peer_does_not_do_is_refused_before_anything_is_measured():
    with pytest.raises(ValueError, match="--peer trl does step, not decode"):
        bench.main(arguments("decode", "--peer=trl"))


def test_no_part_begins_when_the_minutes_are_over(monkeypatch, capsys):
    monkeypatch.setattr(bench, "machine", lambda: MACHINE)
    words = ["all", "--smoke", "--only", "vision", "update", "--minutes=1e-9"]
    assert bench.main(arguments(*words)) == 1
    assert "update: left out, 1e-09 minutes are over (--minutes)" in capsys.readouterr().out


@pytest.mark.slow
def test_every_part_runs_beside_transformers(tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "it.json"
    assert bench.main(arguments("all", "--smoke", "--peer=hf", f"--json={file}")) == 0
    found = json.loads(file.read_text())
    assert not found["failed"]
    for name in (*PHASES, *bench.HOST):
        assert len(found[name]["seconds"]) == 1 and found[name]["tokens_per_s"] > 0, name
        assert found[name]["recompiles"] == 0, name
    assert set(found["step"]["parts"]) == {"vision", "rollout", "update"}
    for name in peers.PEERS["hf"]:
        assert len(found[name]["peer"]["ratios"]) == 1, name


@pytest.mark.slow
def test_a_step_samples_the_wanted_lengths_and_its_values_stand_at_the_top(tmp_path):
    file = tmp_path / "it.json"
    words = ["step", "--smoke", "--lengths=lognormal:4,0.8", f"--json={file}"]
    with pytest.raises(SystemExit) as stop:
        cli.run(bench.main, bench.parser_for(words), words)
    found = json.loads(file.read_text())
    assert stop.value.code == 0 and len(found["seconds"]) == 1 and found["tokens_per_s"] > 0
    work = smoke(tmp_path, "--lengths=lognormal:4,0.8")
    run = Bench(work)
    rollout = run.generate(run.sampling_params(), work.lengths_PG)
    np.testing.assert_array_equal(rollout.completion_mask.sum(-1), work.lengths_PG)
