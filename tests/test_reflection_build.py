"""The reflection builder from records to a data set, against a server with every fault."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import openai_server
import pytest
import reflection_world

from srpo_jax.data.encoders import sft_response
from srpo_jax.data.records import open_records
from srpo_jax.reflection import batches, stages
from srpo_jax.reflection import settings as settings_lib
from srpo_jax.reflection.settings import Settings
from srpo_jax.reflection.store import Result, Store
from srpo_jax.reflection.write import account, tally
from srpo_jax.remote.client import Fatal
from srpo_jax.rewards.answers import Question
from srpo_jax.rewards.verifier import Verifier
from tools import build_reflection_data as tool
from tools.demo import tiles

ROOT = Path(__file__).resolve().parent.parent
RECORDS = 96
PUZZLES = ROOT.parent / "shared" / "data" / "puzzlevqa_1000" / "data.jsonl"
FAULTS = {
    "429": 0.04, "429_retry_after": 0.02, "500": 0.03, "503": 0.03, "timeout": 0.01, "cut": 0.03,
    "not_json": 0.02,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with tile problems as records and what the server knows of them."""
    folder = tmp_path_factory.mktemp("world")
    problems = tiles.draw_splits(3, {"rl": RECORDS})["rl"]
    tiles.write_jsonl(folder / "tiles.jsonl", tiles.records(problems, 3, "rl", reflect=False))
    records = open_records(folder / "tiles.jsonl")
    records = [records[i] for i in range(len(records))]
    reflection_world.write_world(folder / "world.json", records, Settings())
    return folder


@pytest.fixture
def heard(world, monkeypatch):
    """The world is what ``reflection_world.answer`` speaks of."""
    monkeypatch.setenv("REFLECTION_WORLD", str(world / "world.json"))
    monkeypatch.setattr(reflection_world, "_WORLD", {})
    monkeypatch.setenv("OPENAI_API_KEY", "sk-never-to-be-seen-123456")


def command(world: Path, workdir: Path, url: str, *more: str, name: str = "run") -> list[str]:
    """Arguments of the tool with one server as policy and teacher."""
    return [
        *(name, "--workdir", str(workdir), "--records", str(world / "tiles.jsonl")),
        *("--policy_model", "policy", "--policy_url", url),
        *("--teacher_model", "teacher", "--teacher_url", url),
        *("--concurrency", "8", "--timeout", "0.3", "--share_correct", "-1", "--tries", "4"),
        *("--grading_workers", "1", "--validation_share", "0.2", *more),
    ]


def build(*arguments: str) -> int:
    """Run the tool in this process."""
    return tool.main(tool.make_parser().parse_args(list(arguments)))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def data_set(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file of a data set but the card, whose times and errors differ."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("card.")
    }


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    """One whole run against a faulty server: (work directory, server)."""
    workdir = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFLECTION_WORLD", str(world / "world.json"))
        patch.setattr(reflection_world, "_WORLD", {})
        faulty = openai_server.Server(reflection_world.answer, FAULTS, seed=1, hang=2.0)
        with faulty as server:
            assert build(*command(world, workdir, server.base_url)) == 0
    return workdir, server


# ---------------------------------------------------------------------------------- the result


def test_everything_accepted_is_right_in_both_targets(built):
    workdir, _ = built
    for target in ("rl_aligned", "paper"):
        for split in ("train", "validation"):
            records = open_records(workdir / "data" / f"{target}_{split}.jsonl")
            rows = [records[i] for i in range(len(records))]
            assert rows
            with Verifier(1) as verifier:
                asked = [Question(r.answer, r.choices) for r in rows]
                seconds, firsts = (
                    [(question, r.extra[name]) for question, r in zip(asked, rows, strict=True)]
                    for name in ("second_answer", "first_answer")
                )
                assert all(verifier.check(seconds))
                labels = [r.extra["first_correct"] for r in rows]
                assert verifier.check(firsts) == labels
            for row in rows:
                assert sft_response(row, target).count("<think>") == 1 + (target == "rl_aligned")
                assert "reference" not in row.extra["reflection"]


def test_every_record_is_accounted_for_once_and_totals_add_up(built):
    workdir, server = built
    card = json.loads((workdir / "data/card.json").read_text())
    assert sum(card["accounted"].values()) == RECORDS
    assert card["items"] == card["accounted"]["accepted"] == sum(card["splits"].values())
    assert card["items"] == card["first_attempts"]["right"] + card["first_attempts"]["wrong"]
    stages = card["stages"]
    assert stages["attempt"]["ok"] + sum(stages["attempt"]["reasons"].values()) == RECORDS
    replies = stages["reflect"]["ok"] + sum(stages["reflect"]["reasons"].values())
    checked = stages["check"]["ok"] + sum(stages["check"]["reasons"].values())
    assert checked == stages["reflect"]["ok"]
    assert RECORDS + replies == sum(server.answered.values())
    assert stages["check"]["ok"] == card["items"]
    wanted = {"second answer wrong", "leaked gold", "not the template"}
    assert wanted <= set(stages["check"]["reasons"])
    wanted = {"refusal", "empty reply", "not JSON", "outside the schema", "empty reflection"}
    assert wanted <= set(stages["reflect"]["reasons"])
    errors = Counter(stages["attempt"]["errors"]) + Counter(stages["reflect"]["errors"])
    assert {"429", "500", "503", "timeout", "cut", "not_json"} <= set(errors)


def test_an_image_stands_in_one_split_only_and_lies_beside_the_data(built):
    workdir, _ = built
    images = {
        split: {i for row in lines(workdir / f"data/paper_{split}.jsonl") for i in row["images"]}
        for split in ("train", "validation")
    }
    assert not images["train"] & images["validation"]
    for name in images["train"] | images["validation"]:
        assert (workdir / "data" / name).is_file()


def test_array_records_hold_the_same_with_the_images_inside(built):
    workdir, _ = built
    plain = open_records(workdir / "data/rl_aligned_train.jsonl")
    packed = open_records(workdir / "data/rl_aligned_train.array_record")
    assert len(plain) == len(packed)
    for i in range(len(plain)):
        assert packed[i].extra == plain[i].extra
        path = workdir / "data" / plain[i].images[0].path
        assert packed[i].images[0].data == path.read_bytes()


def test_the_key_is_in_no_file_and_no_output(world, heard, tmp_path, capfd):
    with openai_server.Server(reflection_world.answer, {"500": 0.05}, seed=2) as server:
        build(*command(world, tmp_path, server.base_url))
    build("status", "--workdir", str(tmp_path))
    printed = capfd.readouterr()
    for text in (printed.out, printed.err):
        assert "never-to-be-seen" not in text
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"never-to-be-seen" not in path.read_bytes()


def test_a_wrong_key_stops_the_run_at_once_and_the_right_one_goes_on(
    world, heard, tmp_path, monkeypatch
):
    with openai_server.Server(reflection_world.answer, key="right-key-0123") as server:
        with pytest.raises(RuntimeError, match="check the key"):
            build(*command(world, tmp_path, server.base_url))
        assert server.requests <= 8
        monkeypatch.setenv("OPENAI_API_KEY", "right-key-0123")
        assert build("run", "--workdir", str(tmp_path)) == 0


# -------------------------------------------------------------------------- stopping and going on


def test_a_server_that_is_not_there_is_one_line_at_the_start(world, heard, tmp_path, capfd):
    with openai_server.Server(reflection_world.answer) as server:
        pass
    with pytest.raises(Fatal, match=f"policy: no server at http://127.0.0.1:{server.port}"):
        build(*command(world, tmp_path, server.base_url))
    warned = f"warning, of --teacher_model: teacher: no server at http://127.0.0.1:{server.port}"
    assert warned in capfd.readouterr().err


@pytest.mark.parametrize("more", [(), ("--batch", "--poll", "60")])
def test_the_first_ctrl_c_ends_a_run_whose_server_fails(world, heard, tmp_path, more):
    with openai_server.Server(reflection_world.answer, {"503": 1.0}) as server:

        def interrupt():
            while server.requests < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        start = time.monotonic()
        assert build(*command(world, tmp_path, server.base_url, *more)) == tool.STOPPED
        assert time.monotonic() - start < 20  # the breaker's pauses alone last for minutes


def test_stopped_by_items_and_resumed_gives_the_same_data_and_pays_for_nothing_twice(
    world, heard, tmp_path, built
):
    with openai_server.Server(reflection_world.answer) as server:
        run = command(world, tmp_path, server.base_url)
        assert build(*run, "--max_items", "7") == tool.STOPPED
        for _ in range(40):
            if build("run", "--workdir", str(tmp_path)) == 0:
                break
        assert build("run", "--workdir", str(tmp_path), "--max_items", "0") == 0
        assert server.repeats == 0
        requests = sum(server.answered.values())
        assert build("run", "--workdir", str(tmp_path)) == 0
        assert sum(server.answered.values()) == requests
    assert data_set(tmp_path / "data") == data_set(built[0] / "data")


def test_the_budget_stops_before_it_is_passed(world, heard, tmp_path, capfd):
    with openai_server.Server(reflection_world.answer) as server:
        run = command(world, tmp_path, server.base_url, "--policy_price_out", "1e6")
        assert build(*run, "--budget_usd", "300") == tool.STOPPED
    assert "budget of $300 is used up" in capfd.readouterr().err
    with Store(tmp_path, write=False) as store:
        assert 150 < store.cost() <= 330  # replies differ in length


def test_settings_that_shaped_results_cannot_change_under_them(world, heard, tmp_path):
    with openai_server.Server(reflection_world.answer) as server:
        run = command(world, tmp_path, server.base_url, "--max_items", "3")
        assert build(*run) == tool.STOPPED
        with pytest.raises(ValueError, match="--attempt_temperature differ.*reset --stage attempt"):
            build("run", "--workdir", str(tmp_path), "--attempt_temperature", "0.9")
        # Nothing was reflected on yet: the teacher may still change.
        more = ("--teacher_model", "other", "--max_items", "1")
        assert build("run", "--workdir", str(tmp_path), *more) == tool.STOPPED


def test_two_builders_in_one_directory_are_refused(tmp_path):
    with Store(tmp_path, write=True), pytest.raises(RuntimeError, match="in use by process"):
        Store(tmp_path, write=True)


def test_a_reset_throws_away_a_stage_and_those_after_it(world, heard, tmp_path):
    with openai_server.Server(reflection_world.answer) as server:
        build(*command(world, tmp_path, server.base_url))
        before = sum(server.answered.values())
        first = data_set(tmp_path / "data")
        build("reset", "--workdir", str(tmp_path), "--stage", "reflect")
        build("run", "--workdir", str(tmp_path))
        again = sum(server.answered.values()) - before
    assert 0 < again < before
    assert data_set(tmp_path / "data") == first


# -------------------------------------------------------------------------------------- batches


def test_batches_give_the_same_data_and_a_lost_batch_is_found_again(
    world, heard, tmp_path, built, monkeypatch
):
    marked = []
    mark = batches.BatchDriver._mark

    def die_once(self, key, name, state):
        """Killed between the vendor's yes and our note of it."""
        marked.append(key)
        if len(marked) == 1:
            raise KeyboardInterrupt
        mark(self, key, name, state)

    monkeypatch.setattr(batches.BatchDriver, "_mark", die_once)
    with openai_server.Server(reflection_world.answer, polls=2, unfinished=1) as server:
        run = command(world, tmp_path, server.base_url, "--batch", "--poll", "0.01")
        with pytest.raises(KeyboardInterrupt):
            build(*run, "--batch_size", "20")
        assert build("run", "--workdir", str(tmp_path)) == tool.STOPPED  # one never finishes
        server.unfinished = 0
        assert build("run", "--workdir", str(tmp_path)) == 0
    assert marked[0] == marked[1]
    assert data_set(tmp_path / "data") == data_set(built[0] / "data")


def test_a_batch_that_never_reached_the_vendor_goes_out_anew(
    world, heard, tmp_path, built, monkeypatch
):
    async def die(self, requests, key):
        raise KeyboardInterrupt

    with openai_server.Server(reflection_world.answer) as server:
        run = command(world, tmp_path, server.base_url, "--batch", "--poll", "0.01")
        with monkeypatch.context() as patch:
            patch.setattr(batches.BatchClient, "submit", die)
            with pytest.raises(KeyboardInterrupt):
                build(*run, "--batch_size", "20")
        with Store(tmp_path, write=False) as store:
            assert list(store.query("SELECT state FROM batches")) == [("submitting",)]
        # Not even what was written down goes out beyond the limit.
        assert build(*run, "--batch_size", "20", "--max_items", "7") == tool.STOPPED
        with Store(tmp_path, write=False) as store:
            assert store.count("SELECT COUNT(*) FROM results") == 7
        assert build("run", "--workdir", str(tmp_path), "--max_items", "0") == 0
    assert server.repeats == 0
    assert data_set(tmp_path / "data") == data_set(built[0] / "data")


def test_many_batches_are_under_way_at_once_and_none_is_above_its_bytes(
    world, heard, tmp_path, built, monkeypatch
):
    monkeypatch.setattr(batches, "BATCH_BYTES", 100_000)
    with openai_server.Server(reflection_world.answer, polls=30) as server:
        run = command(world, tmp_path, server.base_url, "--batch", "--poll", "0.01")
        assert build(*run, "--tries", "4") == 0
        files = [server.files[batch["input_file_id"]] for batch in server.batches.values()]
    assert server.max_open_batches > 3
    assert max(map(len, files)) < 115_000  # one request may stand over the edge
    assert data_set(tmp_path / "data") == data_set(built[0] / "data")


def test_batches_stay_within_the_number_of_items_and_the_budget(
    world, heard, tmp_path, monkeypatch
):
    monkeypatch.setattr(batches, "FIRST_REQUESTS", 3)
    prices = ("--policy_price_in", "1000", "--policy_price_out", "1000")
    stored = {}
    with openai_server.Server(reflection_world.answer) as server:
        for name, more in (
            ("items", ("--max_items", "30", "--batch_size", "8")),
            ("money", ("--budget_usd", "10", *prices)),
        ):
            run = command(world, tmp_path / name, server.base_url, "--batch", "--poll", "0.01")
            assert build(*run, *more) == tool.STOPPED
            with Store(tmp_path / name, write=False) as store:
                stored[name] = store.count("SELECT COUNT(*) FROM results"), store.cost()
    assert stored["items"][0] == 30
    dearest = 10 / stored["money"][0] * 1.5
    assert 10 - dearest < stored["money"][1] < 10 + dearest, stored


# ----------------------------------------------------------------------- local policy and judge


class LocalPolicy:
    """Half of its answers are right; every fifth text is cut off."""

    name = "local"

    def sample(self, asks, *, prompt, temperature, max_new_tokens):
        assert (prompt, temperature) == ("srpo", 1.0 if asks[0].prefix else 0.2)
        found = []
        for ask in asks:
            rng = random.Random(ask.seed)
            said = ask.record.answer if rng.random() < 0.5 else "99"
            text = f"<think>I count the tiles.</think>\n<answer>$\\boxed{{{said}}}$</answer>"
            if ask.prefix:
                text = f"I look at each of the tiles once more.</reflection>\n{text}"
            ended = rng.random() > 0.2
            found.append((text if ended else text[:40], 10, len(text), ended))
        return found


def test_a_local_policy_reviews_itself_and_a_judge_rates_its_attempts(world, heard, tmp_path):
    def rate(body):
        return json.dumps({"score": body["seed"] % 7})

    with openai_server.Server(rate) as server, Store(tmp_path, write=True) as store:
        settings = Settings(
            records=(str(world / "tiles.jsonl"),), policy_hf_dir="x", attempt_prompt="srpo",
            mode="self", share_correct=-1, batch_size=20, grading_workers=1, max_items=40,
            judge_model="judge", judge_url=server.base_url,
        )  # fmt: skip
        run = stages.Run(store, settings, lambda text: None, LocalPolicy)
        with pytest.raises(stages.Incomplete, match="--max_items=40 is reached"):
            stages.attempt(run)
        run.settings = dataclasses.replace(settings, max_items=0)
        for stage in stages.STAGES.values():
            stage(run)
        counts = tally(store)
        rated = [store.result("judge", item) for item, _ in store.keys("judge")]
        chosen = [item for (item,) in store.query("SELECT item FROM results WHERE "
                                                  "stage = 'select' AND ok")]  # fmt: skip
        assert all(store.result("judge", item).data["score"] >= 3 for item in chosen)
        accepted = account(store)
    assert counts["attempt"]["ok"] + counts["attempt"]["reasons"].pop(stages.CUT_OFF) == RECORDS
    assert all(r.reason == ("outside the schema" if r.data["score"] > 5 else "") for r in rated)
    assert 0 < accepted["accepted"] == counts["check"]["ok"] <= len(chosen)
    assert set(counts["check"]["reasons"]) == {"second answer wrong"}
    assert accepted["rated too low"] > 0


# -------------------------------------------------------------------------------------- selection


def test_the_mix_and_the_target_are_kept_by_substitutes(world, heard, tmp_path, capfd):
    with openai_server.Server(reflection_world.answer) as server:
        more = ("--target_size", "12", "--share_correct", "0.25", "--tries", "1")
        assert build(*command(world, tmp_path, server.base_url), *more) == 0
    card = json.loads((tmp_path / "data/card.json").read_text())
    assert card["first_attempts"] == {"wrong": 9, "right": 3, "share_right": 0.25}
    assert "called up from the reserve" in capfd.readouterr().err


def test_items_of_evaluation_files_and_duplicates_are_removed_with_a_report(world, heard, tmp_path):
    rows = lines(world / "tiles.jsonl")
    train, held_out = world / "some.jsonl", world / "held_out.jsonl"
    train.write_text("\n".join(json.dumps(r) for r in [*rows[:20], {**rows[0], "id": "again"}]))
    held_out.write_text("\n".join(json.dumps(r) for r in rows[5:8]))
    with openai_server.Server(reflection_world.answer) as server:
        arguments = command(world, tmp_path, server.base_url, "--evaluation", str(held_out))
        arguments[arguments.index("--records") + 1] = str(train)
        build(*arguments)
    with Store(tmp_path, write=False) as store:
        found = account(store)
    assert found["in an evaluation file"] == 3
    assert found["duplicate"] == 1
    report = json.loads((tmp_path / "contamination.json").read_text())
    assert {f["id"] for f in report["findings"]} == {row["id"] for row in rows[5:8]}


def test_an_evaluation_row_that_cannot_be_compared_stops_the_audit(world, heard, tmp_path):
    row = lines(world / "tiles.jsonl")[0]
    (tmp_path / "held_out.jsonl").write_text(json.dumps(row))  # its image is not there
    with openai_server.Server(reflection_world.answer) as server:
        more = ("--evaluation", str(tmp_path / "held_out.jsonl"))
        with pytest.raises(ValueError, match="held_out.jsonl:1: image"):
            build(*command(world, tmp_path / "work", server.base_url, *more))


def test_settings_are_checked_with_their_names():
    for wrong, message in (
        ({"mode": "guess"}, "--mode=guess: choose gold_given"),
        ({"tries": 0}, "--tries must be at least 1"),
        ({"share_correct": 2.0}, "--share_correct"),
        ({"per_source": ("a",)}, "--per_source a: write source=number"),
        ({"max_pixels": 10}, "--max_pixels is below"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)


def test_every_setting_is_an_option_with_help():
    text = tool.make_parser().format_help()
    for field in dataclasses.fields(Settings):
        assert f"--{field.name}" in text
        assert field.metadata["help"]
    assert set(settings_lib.FIELDS) == {f.name for f in dataclasses.fields(Settings)}


def test_a_result_that_is_there_stays_as_it_is(tmp_path):
    with Store(tmp_path, write=True) as store:
        store.put(Result(1, "attempt", data={"text": "first"}))
        store.put(Result(1, "attempt", data={"text": "second"}))
        assert store.results("attempt", 1)[0].data == {"text": "first"}


# ------------------------------------------------------------------------------------ slow: kills


def _serve(folder: Path, faults: dict, log) -> tuple[subprocess.Popen, str]:
    """The server as a process of its own, so that it outlives the builders that are killed."""
    port = folder / "port.txt"
    server = subprocess.Popen(
        [
            *(sys.executable, ROOT / "tests/openai_server.py"),
            *("--answer", "tests.reflection_world:answer", "--port_file", port),
            *("--faults", json.dumps(faults), "--seed", "5", "--delay", "0.2", "--hang", "30"),
        ],
        cwd=ROOT, stdout=log, stderr=log,
        env={**os.environ, "REFLECTION_WORLD": str(folder / "world.json")},
    )  # fmt: skip
    while not (port.is_file() and port.read_text().strip()):
        assert server.poll() is None
        time.sleep(0.05)
    return server, f"http://localhost:{port.read_text().strip()}/v1"


def _answered(url: str) -> int:
    """Chat requests that got a whole answer."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as reply:
        return json.load(reply)["answered"]


@pytest.mark.slow
def test_killed_twenty_times_the_data_set_is_that_of_an_undisturbed_run(tmp_path):
    if not PUZZLES.is_file():
        pytest.skip("needs ../shared/data/puzzlevqa_1000")
    records = open_records(PUZZLES)
    rows = PUZZLES.read_text().splitlines()
    chosen = np.random.default_rng(0).permutation(len(records))[:500]
    (tmp_path / "puzzles.jsonl").write_text("\n".join(rows[i] for i in sorted(chosen)))
    found = open_records(tmp_path / "puzzles.jsonl", PUZZLES.parent)
    found = [found[i] for i in range(len(found))]
    reflection_world.write_world(tmp_path / "world.json", found, Settings())
    log = open(tmp_path / "log", "w")
    concurrency, kills = 8, 20

    def arguments(workdir: Path, url: str) -> list[str]:
        return [
            *(sys.executable, "-m", "tools.build_reflection_data", "run"),
            *("--workdir", str(workdir), "--records", str(tmp_path / "puzzles.jsonl")),
            *("--data_root", str(PUZZLES.parent), "--policy_model", "p", "--policy_url", url),
            *("--teacher_model", "t", "--teacher_url", url, "--concurrency", str(concurrency)),
            *("--timeout", "5", "--target_size", "200", "--validation_share", "0.1"),
        ]

    server, url = _serve(tmp_path, FAULTS | {"timeout": 0.002}, log)
    try:
        run = dict(cwd=ROOT, stdout=log, stderr=log)
        subprocess.run(arguments(tmp_path / "calm", url), check=True, **run)
        calm = _answered(url)
        rng = random.Random(0)
        for _ in range(kills):
            before = _answered(url)
            process = subprocess.Popen(arguments(tmp_path / "killed", url), **run)
            while _answered(url) == before:  # it is at work
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(rng.uniform(0.0, 1.5))
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(arguments(tmp_path / "killed", url), check=True, **run)
        killed = _answered(url) - calm
    finally:
        server.kill()
        log.close()
    assert data_set(tmp_path / "killed/data") == data_set(tmp_path / "calm/data")
    assert killed - calm <= concurrency * kills
    card = json.loads((tmp_path / "killed/data/card.json").read_text())
    assert card["items"] == 200
    assert sum(card["accounted"].values()) == 500
