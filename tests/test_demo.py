"""The embedded demo: its problems, reflections, tokenizer, report; and (slow) the whole of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srpo_jax.data.encoders import PromptEncoder, SftEncoder
from srpo_jax.data.images import load_image
from srpo_jax.data.processing import Processor, token_bytes
from srpo_jax.data.records import open_records
from srpo_jax.model.config import load_config
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.rewards.answers import Question, gold_problem
from srpo_jax.rewards.grade import grade
from srpo_jax.rewards.template import TokenText
from srpo_jax.rewards.verifier import Verifier
from srpo_jax.structs import BLOCKS
from tools.demo import __main__ as run
from tools.demo import data, report, stages, tiles
from tools.demo.tasks import DOT_TILES

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"sft": 200, "rl": 12, "validation": 8, "test": 16}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Data and random model as the demo writes them, only smaller."""
    folder = tmp_path_factory.mktemp("demo")
    data.write_records(folder / "data", 3, SIZES)
    data.write_model(folder / "data", folder / "init/hf", 3)
    return folder


@pytest.fixture(scope="module")
def processor(demo) -> Processor:
    return Processor(demo / "init/hf")


# --- problems ----------------------------------------------------------------------------------


def test_answers_are_sums_and_absolute_differences_of_the_asked_tiles():
    four = (("red", 3), ("blue", 9), ("black", 1), ("green", 5))
    assert tiles.Problem("sum", ("blue", "red"), four).answer == 12
    assert tiles.Problem("diff", ("red", "blue"), four).answer == 6
    assert tiles.Problem("diff", ("black", "green"), four).question == "diff black green"


def test_problems_cover_all_answers_and_name_two_different_colours_of_four():
    rng = np.random.default_rng(0)
    problems = [tiles.draw_problem(rng) for _ in range(3000)]
    assert {p.answer for p in problems} == set(range(19))
    for p in problems:
        colours = [c for c, _ in p.tiles]
        assert len(set(colours)) == 4 and len(set(p.asked)) == 2 and set(p.asked) <= set(colours)
        assert all(1 <= n <= 9 for _, n in p.tiles)


def test_no_problem_stands_in_two_splits_and_the_test_does_not_depend_on_the_training_size():
    small = tiles.draw_splits(5, {"sft": 50, "rl": 50, "validation": 20, "test": 40})
    large = tiles.draw_splits(5, {"sft": 900, "rl": 50, "validation": 20, "test": 40})
    assert small["test"] == large["test"] and small["validation"] == large["validation"]
    for name in ("sft", "rl", "validation"):
        assert not set(large["test"]) & set(large[name])
    assert tiles.draw_splits(6, {"test": 40})["test"] != small["test"]


def test_taken_problems_are_drawn_anew(monkeypatch):
    """With only a handful of possible problems, the training split must avoid those of the test."""
    four = (("red", 3), ("blue", 9), ("black", 1), ("green", 5))
    asked = [(a, b) for a, _ in four for b, _ in four if a != b]

    def few(rng):
        return tiles.Problem("sum", asked[rng.integers(len(asked))], four)

    monkeypatch.setattr(tiles, "draw_problem", few)
    splits = tiles.draw_splits(0, {"sft": 30, "test": 6})
    assert not set(splits["sft"]) & set(splits["test"])


def test_a_picture_shows_each_tile_at_its_place_with_its_colour_and_dots():
    four = (("red", 1), ("blue", 9), ("black", 4), ("green", 7))
    problem = tiles.Problem("sum", ("red", "blue"), four)
    images = tiles.render([problem] * 8, np.random.default_rng(1))
    assert images.shape == (8, 56, 56, 3) and images.dtype == np.uint8
    for k, (colour, dots) in enumerate(four):
        row, column = divmod(k, 2)
        tile = images[:, 28 * row : 28 * row + 28, 28 * column : 28 * column + 28] / 255.0
        white = tile.min(-1) > 0.85
        # A dot of radius 1.95 to 3.25 covers 12 to 33 pixels, some of them grey edge.
        area = white.sum((1, 2)) / dots
        assert (area > 6).all() and (area < 34).all(), (colour, area)
        back = tile[tile.max(-1) < 0.95].reshape(-1, 3)
        assert np.allclose(np.median(back, 0), tiles.COLOURS[colour], atol=0.12)


def test_reflections_follow_from_the_counts():
    rng = np.random.default_rng(2)
    problems = [tiles.draw_problem(rng) for _ in range(2000)]
    wrong = 0
    for p in problems:
        fields = tiles.reflection_fields(p, rng)
        a, b = p.counts
        first = int(fields["first_answer"])
        assert fields["first_correct"] == (first == p.answer) and 0 <= first <= 18
        tile, seen = fields["first_think"].split("=")
        assert tile == p.asked[0] and 1 <= int(seen) <= 9
        if fields["first_correct"]:
            assert int(seen) == a
        verdict = "yes" if first == p.answer else "no"
        assert fields["reflection"] == f"{p.asked[0]}={a} {p.asked[1]}={b} {verdict}"
        left, right = fields["second_think"].split("=")
        assert eval(left) == int(right) == p.answer == int(fields["second_answer"])
        wrong += first != p.answer
    assert 0.45 < wrong / len(problems) < 0.55


def test_a_wrong_look_is_never_right_and_shows_what_went_wrong():
    """Four problems whose possible wrong looks are few enough to list by hand."""
    four = (("red", 9), ("blue", 9), ("black", 9), ("green", 9))
    problem = tiles.Problem("sum", ("red", "blue"), four)
    rng = np.random.default_rng(4)
    found = [tiles.wrong_look(problem, rng) for _ in range(4000)]
    # red read as 7 or 8; blue read as 7 or 8 (red said to be 9); slips by one or two below 18.
    assert set(found) == {(7, 16), (8, 17), (9, 16), (9, 17)}
    shown_wrong = np.mean([seen != 9 for seen, _ in found])
    assert shown_wrong == pytest.approx(tiles.MISREAD_SHARE / 2, abs=0.03)
    for _ in range(3000):
        p = tiles.draw_problem(rng)
        seen, answer = tiles.wrong_look(p, rng)
        assert answer != p.answer and 1 <= seen <= 9 and 0 <= answer <= 18


# --- files -------------------------------------------------------------------------------------


def test_the_records_are_those_of_any_user_and_their_golds_can_be_graded(demo):
    for split, size in SIZES.items():
        suffix = "parquet" if split == "sft" else "jsonl"
        source = open_records(str(demo / f"data/{split}.{suffix}"))
        assert len(source) == size
        record = source[size - 1]
        assert record.id == f"{split}-{size - 1}" and gold_problem(record) is None
        assert load_image(record.images[0]).size == (56, 56)
        assert ("reflection" in record.extra) == (split == "sft")


def test_pictures_survive_the_files_unchanged(demo):
    problems = tiles.draw_splits(3, SIZES)["test"]
    pixels = tiles.render(problems, np.random.default_rng([3, tiles.SPLITS.index("test"), 1]))
    found = np.asarray(Image.open(demo / "data/test_images/test-5.png"))
    assert (found == pixels[5]).all()


def test_tags_and_words_are_one_token_each_and_a_response_is_short(demo, processor):
    record = open_records(str(demo / "data/sft.parquet"))[0]
    encoded = SftEncoder(processor)(record)
    text = processor.tokenizer.convert_ids_to_tokens(encoded.token_ids.tolist())
    assert text.count("<|image_pad|>") == 4  # one for each tile
    for tag in ("<think>", "</think>Ċ", "<answer>", "</answer>Ċ", "</answer>", "<reflection>"):
        assert tag in text, text
    assert (
        encoded.num_tokens <= DOT_TILES.prompt_tokens + DOT_TILES.completion_tokens
        and 27 <= encoded.loss_mask.sum() <= 32
    )
    prompt = PromptEncoder(processor)(record)
    assert prompt.num_tokens == 15 <= DOT_TILES.prompt_tokens
    assert (encoded.token_ids[:15] == prompt.token_ids).all()
    # The system prompt is left out, and only the response is learned.
    assert "system" not in processor.tokenizer.decode(encoded.token_ids)
    assert not encoded.loss_mask[:15].any() and encoded.loss_mask[15:-1].all()


def test_the_longest_response_fits_the_budget(processor):
    four = (("yellow", 9), ("purple", 9), ("black", 1), ("green", 5))
    problem = tiles.Problem("sum", ("yellow", "purple"), four)
    fields = tiles.reflection_fields(problem, np.random.default_rng(0))
    from srpo_jax.data.prompts import srpo_response

    text = srpo_response(*(fields[name] for name in data.BLOCK_FIELDS)) + "<|im_end|>"
    assert len(processor.tokenizer.encode(text)) == 32 <= DOT_TILES.completion_tokens


def test_the_tokenizer_is_byte_level_and_loses_nothing(processor):
    for text in ("Héllo\n wörld 😀", "<think>\\boxed{3}</think>", " yellow=7 no"):
        ids = processor.tokenizer.encode(text)
        table = token_bytes(processor.tokenizer)
        assert b"".join(table[i] for i in ids) == text.encode()
        assert processor.tokenizer.decode(ids) == text


def test_the_model_is_a_small_qwen_with_one_window_a_picture(demo, processor):
    cfg = load_config(demo / "init/hf")
    count = sum(int(np.prod(leaf.shape)) for leaf in abstract_params(cfg).values())
    assert 1.0e6 < count < 1.2e6
    assert cfg.vision.window_slots == DOT_TILES.patches == 16
    assert processor.vocab_size <= cfg.text.vocab_size
    generation = json.loads((demo / "init/hf/generation_config.json").read_text())
    assert generation["eos_token_id"] == list(processor.eos_ids) and len(processor.eos_ids) == 2


def test_the_written_responses_earn_the_full_reward(demo, processor):
    """The SFT targets, graded as completions: format holds, and the answers are as labelled."""
    source = open_records(str(demo / "data/sft.parquet"))
    records = [source[i] for i in range(12)]
    rows = [SftEncoder(processor)(record) for record in records]
    sequences = [row.token_ids[row.loss_mask > 0] for row in rows]
    longest = max(map(len, sequences))
    ids = np.full((12, 1, longest), processor.pad_id)
    mask = np.zeros((12, 1, longest), bool)
    for i, sequence in enumerate(sequences):
        ids[i, 0, : len(sequence)], mask[i, 0, : len(sequence)] = sequence, True
    with Verifier(1) as verifier:
        verdict, details = grade(
            ids,
            mask,
            [Question(record.answer) for record in records],
            token_text=TokenText(token_bytes(processor.tokenizer), processor.eos_ids),
            verifier=verifier,
        )
    assert verdict.format_ok.all() and verdict.reflection_ok.all() and verdict.final_correct.all()
    expected = [record.extra["first_correct"] for record in records]
    assert verdict.first_correct[:, 0].tolist() == expected and not all(expected)
    assert details[0]["first_answer"] == records[0].extra["first_answer"]
    assert (verdict.block_tokens[:, 0, 2] == 5).all()  # colour=, digit, colour=, digit, verdict


# --- report ------------------------------------------------------------------------------------


def evaluation(folder: Path, answers: list[tuple[bool, bool, str]]) -> Path:
    """What srpo_jax.evaluate writes, for answers of (first right, final right, reflection)."""
    folder.mkdir(parents=True)
    rows = [
        {"id": f"p{i}", "first_correct": a, "final_correct": b, "blocks": {"reflection": text}}
        for i, (a, b, text) in enumerate(answers)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rates = ("acc@1", "acc@2", "fix", "harm", "format_rate", "truncated", "tokens")
    summary = {"samples": len(rows)} | dict.fromkeys(rates, 0.25)
    summary |= {f"tokens/{block}": 2.0 for block in BLOCKS}
    ends = {"accuracy": 0.25, "tokens": 30.0}, {"accuracy": 0.05, "tokens": 10.0}
    summary["stop"] = {"points": {"final": ends[0]}, "curve": [ends[1]]}
    (folder / "summary.json").write_text(json.dumps(summary) + "\n")
    return folder


def test_verdicts_count_by_what_the_first_answer_was(tmp_path):
    answers = [
        (False, True, "red=3 blue=4 no"),
        (False, False, "red=3 blue=4 yes"),
        (False, False, "red=3 blue=4 no"),
        (True, True, "red=3 blue=4 no"),
        (True, True, "red=3 blue=4 yes"),
        (False, False, None),
    ]
    row = report.measure(evaluation(tmp_path / "e", answers))
    assert row["detect"] == pytest.approx(2 / 3) and row["false_alarm"] == 0.5
    assert row["acc@2"] == 0.25 and row["blocks"] == [2.0] * 5
    assert row["stop"] == [(10.0, 0.05), (30.0, 0.25)]


def test_the_gain_is_paired_by_problem(tmp_path):
    base = evaluation(tmp_path / "a", [(False, i < 20, "no") for i in range(100)])
    better = evaluation(tmp_path / "b", [(False, i < 50, "no") for i in range(100)])
    found = report.paired_gain(base, better)
    assert found["gain"] == pytest.approx(0.3)
    assert 0.2 < found["low"] < 0.3 < found["high"] < 0.4
    same = report.paired_gain(base, base)
    assert (same["gain"], same["low"], same["high"]) == (0, 0, 0)
    other = evaluation(tmp_path / "c", [(False, True, "no")])
    with pytest.raises(ValueError, match="different problems"):
        report.paired_gain(base, other)


def seed_result(sampled: float, greedy: float) -> dict:
    row = {key: 0.5 for key in report.COLUMNS.values()}
    row |= {"samples": 16, "tokens": 30.0, "blocks": [1.0] * 5}
    row["stop"] = [(10.0, 0.1), (30.0, 0.5)]
    gains = {
        f"{a} - {b}, {what}, {mode}": {"gain": 0.0, "low": -0.01, "high": 0.01}
        for a, b in (("SRPO", "SFT"), ("GRPO", "SFT"), ("SRPO", "GRPO"), ("segments", "GRPO"))
        for what in ("final", "first")
        for mode in report.MODES
    }
    gains["SRPO - SFT, final, sampled"]["gain"] = sampled
    gains["SRPO - SFT, final, greedy"]["gain"] = greedy
    rows = {mode: dict.fromkeys(report.MODELS, row) for mode in report.MODES}
    return {"rows": rows, "gains": gains}


def test_the_demo_fails_without_its_gain_and_when_greedy_loses():
    assert report.verdict([seed_result(0.15, 0.0)]) == []
    assert "less than 10" in report.verdict([seed_result(0.09, 0.0)])[0]
    assert "lost 2.0 points" in report.verdict([seed_result(0.15, -0.02)])[0]
    # Of several seeds the mean counts.
    assert report.verdict([seed_result(0.08, 0.01), seed_result(0.16, -0.005)]) == []


def test_the_table_has_every_model_in_both_modes_and_the_spread_of_seeds():
    text = report.table([seed_result(0.1, 0.0)])
    assert text.count("| SRPO | 50.0 |") == 2 and "±" not in text
    # At 18 of GRPO's 30 tokens: two fifths of the way from 0.1 to 0.5.
    assert text.count("| 26.0 | 30.0 |") == 2 * len(report.MODELS)
    one = seed_result(0.1, 0.0)
    one["rows"]["greedy"]["init"] = one["rows"]["greedy"]["init"] | {"stop": [(33.0, 0.0)]}
    assert report.table([one]).count("| – | 30.0 |") == 1
    assert "| SRPO | 50.0 ± 0.0 |" in report.table([seed_result(0.1, 0.0)] * 2)


# --- stages ------------------------------------------------------------------------------------


def script_stage(folder: Path, name: str, code: str, monkeypatch) -> stages.Stage:
    """A stage whose command runs ``code``, in place of one of the package's."""
    (folder / f"{name}_stage.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return stages.Stage(name, f"{name}_stage", "none", folder / name, done=folder / f"{name}.done")


def test_stages_run_side_by_side_once_and_a_failure_shows_the_log(tmp_path, monkeypatch, capsys):
    meet = """
import pathlib, sys, time
here = pathlib.Path(__file__).parent
(here / "{me}.here").touch()
while not (here / "{other}.here").exists():
    time.sleep(0.01)
(here / "{me}.done").touch()
"""
    pair = [
        script_stage(tmp_path, me, meet.format(me=me, other=other), monkeypatch)
        for me, other in (("a", "b"), ("b", "a"))
    ]
    clock = stages.Clock()
    stages.run_stages(pair, clock)  # would hang if one waited for the other
    assert (tmp_path / "a.done").exists() and (tmp_path / "b.done").exists()
    stages.run_stages(pair, clock)
    assert capsys.readouterr().out.count("done before") == 2
    bad = script_stage(tmp_path, "bad", "raise SystemExit('no such thing')", monkeypatch)
    with pytest.raises(RuntimeError, match="exit code 1.*(\n.*)*no such thing"):
        stages.run_stages([bad], clock)


def test_a_failing_stage_stops_the_others(tmp_path, monkeypatch):
    wait = "import pathlib, time\npathlib.Path(__file__).with_suffix('.up').touch()\ntime.sleep(60)"
    slow = script_stage(tmp_path, "slow", wait, monkeypatch)
    fail = (
        "import pathlib, time\nup = pathlib.Path(__file__).with_name('slow_stage.up')\n"
        "while not up.exists(): time.sleep(0.01)\nraise SystemExit(3)"
    )
    bad = script_stage(tmp_path, "bad", fail, monkeypatch)
    clock = stages.Clock()
    with pytest.raises(RuntimeError, match="exit code 3"):
        stages.run_stages([slow, bad], clock)
    assert clock.seconds() < 50


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    run.open_folder(tmp_path / "out", {"plan": 1})
    run.open_folder(tmp_path / "out", {"plan": 1})
    with pytest.raises(ValueError, match="other settings"):
        run.open_folder(tmp_path / "out", {"plan": 2})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(ValueError, match="not a demo's folder"):
        run.open_folder(tmp_path / "mine", {"plan": 1})


def test_a_seed_has_one_page_of_both_runs_and_all_evaluations(tmp_path, capsys):
    row = {"split": "train", "step": 1, "reward/mean": 1.0}
    for name in ("srpo", "grpo", "segments"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    tested = [f"{n.lower()}_{m}_test" for n in report.MODELS for m in report.MODES]
    for name in tested:
        folder = evaluation(tmp_path / "eval" / name, [(False, True, "no")])
        found = json.loads((folder / "summary.json").read_text())
        found |= {"records": 1, "net_gain": 0.0}
        (folder / "summary.json").write_text(json.dumps(found))
    run.write_page(tmp_path, "test")
    html = (tmp_path / "report.html").read_text("utf-8")
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert '"runs": ["srpo", "grpo", "segments"]' in html
    assert all(f"<td>{name}</td>" in html for name in tested)


def run_notebook(path: Path, out: Path, env: dict[str, str]) -> str:
    """Run a notebook with ``out`` as its folder; what its cells print and show, as text."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert not any(cell.get("outputs") for cell in book.cells), f"{path.name} holds outputs"
    (given,) = (c for c in book.cells if "parameters" in c.metadata.get("tags", ()))
    given.source += f"\nOUT = {str(out)!r}"
    place = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(book, timeout=300, resources=place)
    client.execute(env=env | {"PYTHONPATH": str(ROOT)})
    shown = [one for cell in book.cells for one in cell.get("outputs", ())]
    return "\n".join(str(one.get("text") or one.get("data")) for one in shown)


@pytest.mark.slow
def test_the_whole_demo_in_its_quick_form_and_the_notebook_that_shows_it(tmp_path, one_device_env):
    """Every stage as a real command; what it exports is what transformers loads."""
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "tools.demo", "--quick", "--out", str(out)]
    settings = dict(cwd=ROOT, env=one_device_env, capture_output=True, text=True)
    done = subprocess.run(command, **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| SRPO |" in done.stdout and "not checked" in done.stdout
    assert str(out / "seed0/report.html") in done.stdout
    results = json.loads((out / "results_test.json").read_text())
    assert [s["seed"] for s in results["seeds"]] == [0]
    assert results["seeds"][0]["rows"]["greedy"]["init"]["samples"] == run.QUICK.test
    for name in ("sft", "srpo", "grpo", "segments"):
        steps = {"sft": run.QUICK.sft_steps}.get(name, run.QUICK.rl_steps)
        rows = (out / f"seed0/{name}/metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, steps + 1))
        assert (out / f"seed0/{name}/hf/model.safetensors").exists()
    pytest.importorskip("torch")
    assert "transformers loads the export" in done.stdout
    # A second run, that of the notebook, finds everything done.
    told = run_notebook(ROOT / "docs/quickstart.ipynb", out, one_device_env)
    assert "seed 0" in told and "done before" in told and "started" not in told
    assert "text/markdown" in told and "image/svg+xml" in told
    page = os.path.relpath(out / "seed0/report.html", ROOT / "docs")
    assert page in told and (ROOT / "docs" / page).is_file()
