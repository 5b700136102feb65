"""The page of a training run: what stands in its data, and that model text stays text."""

import json
import re
from pathlib import Path

import pytest
from page_helpers import EVIL, Page

from srpo_jax.data.files import write_jsonl
from srpo_jax.report import curves, run_page
from srpo_jax.structs import RunError

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
