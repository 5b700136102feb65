"""The page of a training run: what stands in its data, and that model text stays text."""

import base64
import contextlib
import gzip
import importlib
import json
import re
import threading
from http.client import HTTPConnection
from pathlib import Path

import jax
import pytest
from page_helpers import EVIL, Page
from PIL import Image

from srpo_jax.data.files import write_jsonl
from srpo_jax.report import curves, health, rollouts, run_page
from srpo_jax.run.metrics import MetricWriter
from srpo_jax.run.recipe import stock, write_config
from srpo_jax.run.stored import FORMAT
from srpo_jax.structs import RunError
from tools import report

METRICS = Path(__file__).parent.parent / "docs/metrics.md"


def metric_rows(count, **more):
    """Rows of training with a reward, an accuracy, and what is given."""
    plain = {"run": 1, "split": "train", "time": 0.0, "reward/mean": 1.0, "accuracy/first": 0.5}
    return [plain | {"step": step, "fix/count": 3, "mfu": None} | more for step in range(count)]


def run_of(path, rows):
    """A run's folder with these metric rows."""
    write_jsonl(path / "metrics.jsonl", rows)
    return run_page.read(path)


def data_of(html, name="data"):
    """The JSON that the page holds under an id."""
    text = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html)[1]
    return json.loads(text)


def titles(charts):
    return [(chart["section"], chart["title"]) for chart in charts]


# --- curves --------------------------------------------------------------------------------------


def test_runs_are_laid_over_each_other(tmp_path):
    first = run_of(tmp_path / "a", metric_rows(3))
    second = run_of(tmp_path / "b", metric_rows(2, **{"reward/mean": 2.0}))
    found = data_of(run_page.page([first, second]))
    assert found["runs"] == ["a", "b"] and found["axes"] == [[0, 1, 2], [0, 1]]
    assert titles(found["charts"]) == [
        ("Reward", "Reward"),
        ("Answers", "Accuracy, first and final answer"),
    ]
    assert [(s["run"], s["axis"], s["values"]) for s in found["charts"][0]["series"]] == [
        (0, 0, [1.0, 1.0, 1.0]),
        (1, 1, [2.0, 2.0]),
    ]


def test_rewards_of_different_kinds_are_said_to_be_no_one_measure():
    def page(*profiles):
        return run_page.page(
            [
                run_page.Run(f"/runs/{i}", metric_rows(2), {"reward": {"profile": name}, "seed": i})
                for i, name in enumerate(profiles)
            ]
        )

    assert "not one measure" in page("paper", "grpo")
    assert "not one measure" not in page("paper", "paper") + page("grpo")


def test_an_unknown_metric_is_drawn_under_its_prefix():
    rows = metric_rows(2, **{"mine/new": 3, "lonely": 1.5, "flag": True, "text": "x"})
    found = titles(curves.charts({"a": rows})["charts"])
    assert found[-2:] == [("Others", "by themselves"), ("Others", "mine")]
    assert len(found) == 4


def test_every_metric_of_the_documentation_has_a_chart():
    names = re.findall(r"`([a-z_/]+)`", METRICS.read_text("utf-8"))
    known = [name for name in names if "_" in name or "/" in name]
    rows = metric_rows(1, **dict.fromkeys(known, 1.0))
    found = curves.charts({"a": rows})["charts"]
    assert [c["title"] for c in found if c["section"] == "Others"] == []


def test_an_evaluation_has_charts_of_its_own():
    rows = metric_rows(1) + metric_rows(1, split="eval", **{"acc@1": 0.1, "acc@2": 0.2})
    found = curves.charts({"a": rows})["charts"]
    (both,) = (chart for chart in found if chart["title"] == "acc@1 and acc@2")
    assert both["section"] == "Evaluation: eval"
    assert [series["name"] for series in both["series"]] == ["acc@1", "acc@2"]


def test_what_is_not_finite_is_a_gap():
    rows = metric_rows(2)
    rows[0]["reward/mean"] = None
    (reward, _) = curves.charts({"a": rows})["charts"]
    assert reward["series"][0]["values"] == [None, 1.0]


def test_a_long_run_is_thinned_to_means():
    rows = metric_rows(2 * curves.MAX_POINTS + 1)
    for row in rows:
        row["reward/mean"] = float(row["step"] % 3)
    found = curves.charts({"a": rows})
    values = found["charts"][0]["series"][0]["values"]
    assert len(values) == len(found["axes"][0]) <= curves.MAX_POINTS
    assert values[:2] == [1.0, 1.0] and found["axes"][0][:2] == [2, 5]


def test_a_run_without_a_step_or_with_one_has_a_page(tmp_path):
    empty = run_page.page([run_of(tmp_path / "empty", [])])
    assert "No metrics yet." in empty and data_of(empty)["charts"] == []
    one = data_of(run_page.page([run_of(tmp_path / "one", metric_rows(1))]))
    assert one["charts"][0]["series"][0]["values"] == [1.0]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"no metrics\.jsonl there; --workdir and --compare"):
        run_page.read(tmp_path)


def test_names_are_the_shortest_that_tell_runs_apart():
    assert run_page.names(["/a/b/srpo", "/a/c/srpo"]) == ["b/srpo", "c/srpo"]
    assert run_page.names(["/a/b", "/a/b"]) == ["/a/b (1)", "/a/b (2)"]


def test_the_page_is_well_formed_and_asks_for_nothing_from_outside(tmp_path):
    html = run_page.page([run_of(tmp_path / "a", metric_rows(2, **{f"x/{EVIL}": 1.0}))])
    found = Page(html)
    for _, attrs in found.tags:
        assert attrs.get("href", "#").startswith("#") and "src" not in attrs
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert [attrs.get("type") for attrs in found.all("script")] == ["application/json", None]


# --- rollouts ------------------------------------------------------------------------------------


def sample(number, **more):
    """A row of rollouts/."""
    plain = {
        "step": 1, "round": 0, "id": "p-0", "sample": number, "gold": "7", "tokens": 5,
        "first_answer": "7", "final_answer": "7", "first_correct": True, "final_correct": True,
        "format_ok": True, "completion": "<think>x</think>", "finished": True,
        "block_tokens": {"first_think": 2}, "reflection_ok": True, "r_acc": 0.123456789,
        "mine": 2, "total": 1.5, "advantage": -0.5, "rest_advantage": -0.5, "weight": 1.0,
        "question": "How many?", "choices": ["6", "7"], "images": ["a.png"], "source": "s",
        "origin": "data.jsonl:1",
    }  # fmt: skip
    return plain | more


def write_rollouts(folder, *files):
    for step, rows in enumerate(files, 1):
        write_jsonl(folder / "rollouts" / f"{step:06d}.jsonl", rows)


def packed(*folders, samples=100, problems=10, pictures=lambda run, row: ()):
    rooms = [folder / "rollouts" for folder in folders]
    return rollouts.pack(rooms, pictures, samples=samples, problems=problems)


def unpacked(parts):
    return [
        group
        for part in parts
        for group in json.loads(gzip.decompress(base64.b64decode(part)).decode())
    ]


def test_a_group_holds_its_problem_and_its_samples_with_every_term(tmp_path):
    write_rollouts(tmp_path, [sample(0), sample(1, no_reward="late")])
    (group,) = unpacked(packed(tmp_path).parts)
    samples = group.pop("samples")
    asked = {"id": "p-0", "question": "How many?", "gold": "7", "choices": ["6", "7"]}
    assert asked.items() <= group.items() and group["images"] == ["a.png"]
    assert [s["terms"] for s in samples] == [{"r_acc": 0.12346, "mine": 2}] * 2
    assert samples[0].keys() >= {"completion", "total", "advantage", "tokens", "finished"}
    assert samples[1]["no_reward"] == "late" and "question" not in samples[1]


def test_rows_fall_into_groups_also_where_a_problem_comes_twice(tmp_path):
    pair, other = [sample(0), sample(1)], [sample(0, id="p-1"), sample(1, id="p-1")]
    write_rollouts(tmp_path, [*pair, *pair, *other, sample(0, round=1)], [sample(0, step=2)])
    groups = unpacked(packed(tmp_path).parts)
    found = [(g["step"], g["round"], g["id"], len(g["samples"])) for g in groups]
    assert found == [
        (1, 0, "p-0", 2), (1, 0, "p-0", 2), (1, 0, "p-1", 2), (1, 1, "p-0", 1), (2, 0, "p-0", 1)
    ]  # fmt: skip


def test_the_index_finds_changes_of_verdict_rewards_and_lengths(tmp_path):
    fixed = sample(1, first_correct=False, total=-1.0, tokens=9)
    write_rollouts(tmp_path / "a", [sample(0), fixed])
    write_rollouts(tmp_path / "b", [sample(0, final_correct=False)])
    assert packed(tmp_path / "a", tmp_path / "b").index == {
        "run": [0, 1], "step": [1, 1], "changes": [0b1010, 0b0100], "low": [-1.0, 1.5],
        "high": [1.5, 1.5], "short": [5, 5], "long": [9, 5],
    }  # fmt: skip


def test_parts_are_of_equal_size_so_that_a_group_is_found_by_its_number(tmp_path):
    write_rollouts(tmp_path, [sample(0, id=f"p-{i}") for i in range(rollouts.PART + 1)])
    found = packed(tmp_path)
    assert [len(unpacked([part])) for part in found.parts] == [rollouts.PART, 1]
    assert len(found.index["step"]) == rollouts.PART + 1


def test_of_too_many_samples_every_nth_group_is_taken(tmp_path):
    steps = [[sample(g, id=f"p-{p}", step=step) for p in range(4) for g in (0, 1)]
             for step in (1, 2, 3)]  # fmt: skip
    write_rollouts(tmp_path, *steps)
    found = packed(tmp_path, samples=12)
    assert (found.shown, found.total) == (12, 24)
    assert found.index["step"] == [1, 1, 2, 2, 3, 3]
    none = packed(tmp_path, samples=0)
    assert (none.parts, none.shown, none.total) == ([], 0, 24)


def test_images_are_held_once_for_a_problem_and_their_faults_told(tmp_path):
    rows = [sample(0, id=f"p-{i}", origin=f"data.jsonl:{i}") for i in (1, 2)]
    write_rollouts(tmp_path, rows, [sample(0, step=2), sample(0, id="text", step=2, images=[])])
    asked = []

    def pictures(run, row):
        asked.append((run, row["origin"]))
        if row["origin"].endswith("2"):
            raise ValueError("a.png is gone")
        return [Image.new("RGB", (600, 300))]

    found = packed(tmp_path, pictures=pictures)
    assert asked == [(0, "data.jsonl:1"), (0, "data.jsonl:2")]
    assert [group.get("picture") for group in unpacked(found.parts)] == [0, 1, 0, None]
    ((url, *size),) = found.pictures[0]["images"]
    assert url.startswith("data:image/") and size == [600, 300]
    assert found.pictures[1] == {"images": [], "image_fault": "a.png is gone"}
    assert [*packed(tmp_path, problems=1).pictures] == [0]
    assert packed(tmp_path, problems=0).pictures == {}


def test_a_reward_that_is_not_finite_leaves_the_page_readable(tmp_path):
    write_rollouts(tmp_path, [sample(0, r_acc=float("nan"), total=float("-inf"))])
    found = packed(tmp_path)
    (group,) = unpacked(found.parts)
    assert group["samples"][0]["total"] is group["samples"][0]["terms"]["r_acc"] is None
    assert found.index["low"] == [0.0]


def test_rollouts_written_before_they_held_questions_are_shown(tmp_path):
    new = ("question", "choices", "images", "source", "origin")
    old = {name: value for name, value in sample(0).items() if name not in new}
    write_rollouts(tmp_path, [old])
    (group,) = unpacked(packed(tmp_path).parts)
    assert group["id"] == "p-0" and "picture" not in group


def test_nothing_a_model_wrote_stands_in_the_page_as_markup(tmp_path):
    evil = dict.fromkeys(("id", "completion", "question", "gold", "source", "first_answer"), EVIL)
    write_rollouts(tmp_path / EVIL[:8], [sample(0, **evil, images=[EVIL], **{EVIL: 1.0})])
    html = run_page.page([run_of(tmp_path / EVIL[:8], metric_rows(1, **{EVIL: 1.0}))])
    found = Page(html)
    assert [s.get("id") for s in found.all("script")] == [
        "data", "index", "part-0", "picture-0", None
    ]  # fmt: skip
    assert found.all("img") == []
    for script in ("run_curves.js", "run_rollouts.js"):  # text becomes text there, too
        code = Path(run_page.__file__).with_name(script).read_text("utf-8")
        assert not re.search("innerHTML|outerHTML|insertAdjacentHTML|document.write|eval", code)


def test_a_run_without_rollouts_says_so(tmp_path):
    assert "No rollouts" in run_page.page([run_of(tmp_path, metric_rows(1))])
    write_rollouts(tmp_path, [sample(0)])
    assert "1 samples were left out" in run_page.page([run_page.read(tmp_path)], samples=0)


# --- warnings ------------------------------------------------------------------------------------


def course(**ends):
    """Rows of 50 steps; each metric goes from the first of its two values to the second."""
    return [
        {"split": "train", "step": step}
        | {name.replace("__", "/"): pair[step >= 25] for name, pair in ends.items()}
        for step in range(50)
    ]


@pytest.mark.parametrize(
    ("title", "bad", "good"),
    [
        (
            "Wrong first on purpose?",
            {"accuracy__first": (0.6, 0.2), "accuracy__final": (0.6, 0.9)},
            {"accuracy__first": (0.6, 0.7), "accuracy__final": (0.6, 0.9)},
        ),
        (
            "Reflection harms more than it mends",
            {"fix__count": (5, 1), "harm__count": (1, 5)},
            {"fix__count": (1, 5), "harm__count": (5, 1)},
        ),
        (
            "The reflection shrinks",
            {"block_tokens__reflection": (100.0, 30.0)},
            {"block_tokens__reflection": (100.0, 50.0)},
        ),
        (
            "The reflection does not know right from wrong",
            {"detection_margin": (0.3, 0.01), "stated_share": (0.9, 0.9)},
            {"detection_margin": (0.01, 0.3), "stated_share": (0.9, 0.9)},
        ),
        (
            "Few reflections state a verdict",
            {"block_tokens__reflection": (30.0, 30.0), "stated_share": (0.5, 0.05)},
            {"block_tokens__reflection": (0.0, 0.0), "stated_share": (0.5, 0.05)},
        ),
        ("Samples are cut off", {"truncated_share": (0, 0.1)}, {"truncated_share": (0.5, 0.01)}),
        (
            "Most groups teach nothing",
            {"groups_without_signal": (0.1, 0.9)},
            {"groups_without_signal": (0.9, 0.1)},
        ),
        (
            "The filter leaves little",
            {"filter__kept_share": (1, 0.1)},
            {"filter__kept_share": (0, 1)},
        ),
        ("Samples repeat themselves", {"repeat_share": (0.1, 0.5)}, {"repeat_share": (0.5, 0.5)}),
        (
            "Samples of a group are copies",
            {"duplicate_share": (0.1, 0.7)},
            {"duplicate_share": (0.7, 0.1)},
        ),
        ("The entropy collapses", {"entropy": (1.0, 0.1)}, {"entropy": (0.1, 1.0)}),
        (
            "Answers are not graded",
            {"grading__timeouts": (0, 5), "samples": (100, 100)},
            {"grading__timeouts": (5, 0), "samples": (100, 100)},
        ),
        ("Groups without a reward", {"reward__failed": (0, 1)}, {"reward__failed": (1, 0)}),
        ("Updates were left out", {"skipped": (0, 2)}, {"skipped": (0, 0)}),
    ],
)
def test_a_run_that_goes_wrong_is_warned_of_with_what_helps(title, bad, good):
    (found,) = health.findings(course(**bad))
    assert found.title == title and found.found and found.remedy
    assert health.findings(course(**good)) == []


def test_a_run_that_logs_nothing_warns_of_nothing():
    assert health.findings([]) == health.findings(metric_rows(1)) == []


# --- evaluations, configuration ------------------------------------------------------------------


def write_meta(folder, step, config):
    """A checkpoint, as far as its configuration is concerned."""
    path = folder / "checkpoints" / str(step)
    (path / "meta").mkdir(parents=True)
    meta = {"format": FORMAT, "step": step, "config": config, "origin": "runs/sft"}
    (path / "meta/metadata").write_text(json.dumps(meta))
    (path / "params").mkdir()


def test_what_differs_from_the_recipe_or_between_runs_is_marked():
    recipe = {"a": 1, "b": {"c": [1], "d": "x", "e": 0}}
    one = {"a": 2, "b": {"c": [1], "d": "x"}}
    two = {"a": 2, "b": {"c": [1], "d": "y", "new": 0}}
    found = run_page.keys([one, two, {}], lambda config: recipe)
    assert found == [
        ("a", "1", ["2", "2", "–"], True),
        ("b.c", "[1]", ["[1]", "[1]", "–"], False),
        ("b.d", '"x"', ['"x"', '"y"', "–"], True),
        ("b.new", "–", ["–", "0", "–"], False),
    ]


@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_a_runs_recipe_is_that_of_its_stage_and_size(stage):
    config = importlib.import_module(f"configs.{stage}").get_config("size=3b").to_dict()
    config["optim"]["lr"] = 0.5
    found = run_page.keys([json.loads(json.dumps(config))], lambda own: stock(dict(own)))
    assert [key for key, _, _, changed in found if changed] == ["optim.lr"]


def test_the_configuration_is_that_of_the_newest_checkpoint_that_can_be_read(tmp_path):
    for step in (1, 2, 3):
        write_meta(tmp_path, step, {"steps": step})
    (tmp_path / "checkpoints/3/meta/metadata").write_text("{")
    run = run_of(tmp_path, metric_rows(1))
    assert (run.config, run.origin) == ({"steps": 2}, "runs/sft")
    assert "Not known: neither" in run_page.page([run_of(tmp_path / "new", [])])
    write_config(tmp_path / "new", {"steps": 7})  # a run writes it before its first checkpoint
    new = run_page.read(tmp_path / "new")
    assert (new.config, new.steps) == ({"steps": 7}, 7)


def test_evaluations_stand_in_a_table_with_their_intervals(tmp_path):
    rates = {"acc@1": 0.4, "acc@2": 0.5, "fix": 0.25, "harm": 0.1, "net_gain": 0.1}
    rates |= {"records": 8.0, "tokens": 30.2}
    run = run_of(tmp_path / "a", metric_rows(1) + metric_rows(1, split="eval", **rates))
    summary = rates | {"records": 8, "interval": {"acc@2": [0.4, 0.6]}}
    texts = Page(run_page.page([run], evaluations={"test": summary})).texts
    assert {"a, step 0", "test", "50.0", "50.0 (40.0 to 60.0)"} <= {*texts}


def test_evaluations_that_tell_of_early_stops_have_a_curve_against_tokens(tmp_path):
    def at(tokens, accuracy):
        return {"tokens": tokens, "accuracy": accuracy}

    stop = {"curve": [at(10.0, 0.25), at(20.0, 0.5)], "points": {"final": at(30.0, 0.75)}}
    rates = dict.fromkeys(("acc@1", "acc@2", "fix", "harm", "net_gain", "tokens"), 0.5)
    rates |= {"records": 8, "interval": {}}
    run = run_of(tmp_path / "a", metric_rows(1))
    tested = {"with <it>": rates | {"stop": stop}, "without": rates}
    page = run_page.page([run], evaluations=tested)
    assert page.count("<polyline") == 1 and page.count("<circle") == 3
    assert "with &lt;it&gt;" in page and "<it>" not in page
    assert "<figure class" not in run_page.page([run], evaluations={"without": rates})


def test_the_command_writes_the_page_beside_the_run(tmp_path, capsys):
    write_rollouts(tmp_path, [sample(0)])
    run_of(tmp_path, metric_rows(1))
    parser = report.make_parser()
    report.main(parser.parse_args(["--workdir", str(tmp_path)]))
    html = (tmp_path / "report.html").read_text("utf-8")
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert data_of(html, "picture-0")["image_fault"] == "data.jsonl:1 is not there"
    with pytest.raises(SystemExit):
        parser.parse_args(["--workdir", "x", "--images", "-1"])


# --- versions, and the page while a run goes on --------------------------------------------------


def test_a_run_says_what_it_ran_with_and_the_page_shows_it(tmp_path):
    MetricWriter(tmp_path / "a", total_steps=1).close()
    run = run_page.read(tmp_path / "a")
    assert run.versions["jax"] == jax.__version__ and run.versions["srpo_jax"]
    assert run.versions["devices"] == f"{jax.device_count()} x cpu"
    html = run_page.page([run, run_of(tmp_path / "old", metric_rows(1))])
    assert f"<td>jaxlib</td><td>{run.versions['jaxlib']}</td><td>–</td>" in html
    assert "<h2>Versions</h2>" not in run_page.page([run_of(tmp_path / "older", [])])


def answer(step, **more):
    plain = {
        "origin": "a.jsonl:1", "prompt": f"How many? {EVIL}", "gold": "7", "sample": 0, "tokens": 9,
        "first_answer": None, "final_answer": str(step), "first_correct": False,
        "final_correct": step == 7, "response": f"<think>{EVIL}</think>",
    }  # fmt: skip
    return plain | more


def test_the_same_held_out_problems_are_shown_over_time(tmp_path):
    writer = MetricWriter(tmp_path / "a", total_steps=1)
    for step in (5, 7):
        writer.keep(step, [answer(step), answer(step, origin="a.jsonl:2", prompt="Other?")])
    writer.close()
    first, second = run_page.over_time(run_page.read(tmp_path / "a"))
    assert second["question"] == "Other?" and [r["step"] for r in second["rows"]] == [5, 7]
    assert [row["final_correct"] for row in first["rows"]] == [False, True]
    html = run_page.page([run_page.read(tmp_path / "a")])
    assert '<span class="badge bad">5</span> <span class="badge good">7</span>' in html
    assert EVIL not in html and html.count("&lt;think&gt;") == 4


@pytest.fixture
def ask():
    """-> status, headers and text of what a server of a page says to a request."""
    stop = contextlib.ExitStack()

    def open_at(page):
        server = stop.enter_context(report.make_server(page, 0))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stop.callback(server.shutdown)

        def get(path="/", **headers):
            link = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
            stop.callback(link.close)
            link.request("GET", path, headers=headers)
            answer = link.getresponse()
            return answer.status, dict(answer.headers), answer.read().decode()

        return get

    with stop:
        yield open_at


def test_a_served_page_is_new_and_comes_anew(tmp_path, ask):
    run_of(tmp_path / "a", metric_rows(2))
    args = report.make_parser().parse_args(["--workdir", str(tmp_path / "a"), "--serve"])
    get = ask(lambda: report.current(args))
    status, headers, text = get()
    assert status == 200 and data_of(text)["axes"] == [[0, 1]]
    assert headers["Refresh"] == str(report.REFRESH) and "charset=utf-8" in headers["Content-Type"]
    run_of(tmp_path / "a", metric_rows(3))
    assert data_of(get()[2])["axes"] == [[0, 1, 2]]


def test_nothing_but_the_page_is_served_and_only_to_this_machine(ask):
    get = ask(lambda: "page")
    assert get()[0] == get(Host="localhost:1")[0] == 200
    assert get("/metrics.jsonl")[0] == get("/../x")[0] == get(Host="elsewhere.org")[0] == 404


def test_a_folder_that_cannot_be_read_just_now_is_told_and_tried_again(ask):
    pages = iter([OSError("no such file"), "page"])

    def page():
        found = next(pages)
        if isinstance(found, OSError):
            raise found
        return found

    get = ask(page)
    assert get()[0] == 503 and get()[2] == "page"
