"""Tables beside the paper's numbers, the page of items, and the command that writes both."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from srpo_jax.data.files import write_jsonl
from srpo_jax.report import eval_page, table
from tools import eval_report
from tools.lib import cli

RATES = {
    "acc@1": 0.4, "acc@2": 0.5, "fix": 0.25, "harm": 0.125, "net_gain": 0.1,
    "interval": {"acc@1": [0.35, 0.45], "acc@2": [0.447, 0.553]},
}  # fmt: skip


def summary(name=None, mode="official_rule", records=1000, complete="testmini", **more):
    """A summary.json; under a benchmark's rule the answers are 20 points better."""
    out = RATES | {"records": records, "samples": records, "tokens": 812.4, "truncated": 0.0}
    if name:
        answers = {which: {"complete": complete, "tables": {}} for which in ("first", "final")}
        better = {"acc@1": 0.6, "acc@2": 0.7, "interval": {"acc@2": [0.65, 0.75]}}
        out["benchmark"] = RATES | better | {"name": name, "mode": mode} | answers
    return out | more


def row_of(text, start):
    """The cells of the first line of a Markdown text whose first cell is ``start``."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return next(cells for cells in lines if cells[0] == start)


# --------------------------------------------------------------------------------------- tables


def test_the_table_gives_rates_with_intervals():
    cells = row_of(table.markdown({"validation": summary()}), "validation")
    assert cells[1:3] == ["own grader", "1,000"]
    assert cells[3:5] == ["40.0 (35.0 to 45.0)", "50.0 (44.7 to 55.3)"]
    assert cells[5:] == ["25.0", "12.5", "10.0", "812"]


@pytest.mark.parametrize(("first", "fix", "harm"), [(0.0, "25.0", "–"), (1.0, "–", "25.0")])
def test_what_nothing_could_be_of_has_no_rate(first, fix, harm):
    rates = {"acc@1": first, "acc@2": 0.25, "fix": 0.25, "harm": 0.25, "net_gain": 0.25}
    ((_, _, _, *cells, _),) = table.rate_rows({"x": rates | {"records": 4, "tokens": 9.0}})
    assert cells[2:4] == [fix, harm]


def test_a_benchmarks_verdicts_take_the_place_of_our_graders():
    cells = row_of(table.markdown({"x": summary("mathvista")}), "x")
    assert cells[1:5] == ["official_rule", "1,000 (testmini)", "60.0", "70.0 (65.0 to 75.0)"]


def test_the_papers_numbers_stand_beside_ours():
    text = table.markdown({"run 3": summary("mathvista"), "emma": summary("emma")})
    part = text[text.index("## Beside the paper") :]
    head = row_of(part, "evaluation")
    vista = dict(zip(head, row_of(part, "run 3"), strict=True))
    assert (vista["ours, first"], vista["ours, final"]) == ("60.0", "70.0")
    assert (vista["Qwen2.5-VL-7B"], vista["GRPO-7B"], vista["SRPO-7B"]) == ("68.2", "72.3", "75.8")
    assert (vista["Qwen2.5-VL-32B"], vista["SRPO-32B"]) == ("74.7", "78.5")
    emma = dict(zip(head, row_of(part, "emma"), strict=True))
    assert (emma["GRPO-7B"], emma["SRPO-7B"]) == (table.NONE, "29.6")


def test_subjects_of_mmk12_stand_beside_the_papers():
    one = summary("mmk12", "strict")
    for which, accuracy in (("first", 50.0), ("final", 51.5)):
        one["benchmark"][which]["tables"]["subject"] = {
            "Physics": {"accuracy": accuracy, "total": 500, "correct": 0}
        }
    part = table.markdown({"mmk12": one})
    part = part[part.index("## Beside the paper") :]
    assert row_of(part, "mmk12, physics")[1:5] == ["50.0", "51.5", "45.4", "53.5"]
    assert "mmk12, math" not in part


def test_a_file_that_is_no_benchmark_has_no_paper_beside_it():
    text = table.markdown({"validation": summary()})
    assert "paper" not in text


def test_the_papers_data_are_whole():
    models = {model["name"]: model["accuracy"] for model in table.paper()["models"]}
    eight = ["mathvista", "mathverse", "mathvision", "olympiadbench", "wemath", "mmmu_pro",
             "mmmu", "emma"]  # fmt: skip
    assert [models["SRPO-7B"][b] for b in eight] == [
        75.8, 55.8, 32.9, 22.8, 71.6, 42.3, 57.1, 29.6
    ]  # fmt: skip
    assert [models["Qwen2.5-VL-7B"][b] for b in eight] == [
        68.2, 46.3, 25.1, 20.2, 62.1, 36.9, 54.3, 21.5
    ]  # fmt: skip
    # The five benchmarks of the ablation have these means in the paper.
    for name, mean in (("Qwen2.5-VL-7B", 44.4), ("GRPO-7B", 49.8), ("CoT SFT + GRPO-7B", 51.4),
                       ("reflection SFT-7B", 46.6), ("SRPO-7B", 53.5)):  # fmt: skip
        five = [models[name][b] for b in ("mathvista", "mathverse", "mathvision", "mmmu_pro")]
        five.append(models[name]["mmk12"]["physics"])
        assert np.mean(five) == pytest.approx(mean, abs=0.051), name
    assert "2506.01713" in table.paper()["source"]


def test_notes_say_what_a_reader_needs():
    counts = {"complete": None, "no_answer_rows": 3, "drawn_rows": 2, "tables": {}}
    one = summary("mathvision", records=304, samples=1216, unasked=1, truncated=0.05)
    one["benchmark"]["final"] = counts
    notes = "\n".join(table.notes({"mine": one, "file": summary()}))
    assert "FIRST answer block" in notes
    assert "scored by official_rule: the benchmark's own rule" in notes
    assert "mine: not the full benchmark (304 problems)." in notes
    assert "mine: mean over 4 samples a problem" in notes
    assert "mine: 1 problems could not be asked and count as wrong" in notes
    assert "mine: 3 completions have no final answer by rule" in notes
    assert "mine: 2 final answers were drawn at random" in notes
    assert "mine: 5.0 % of the completions were cut off" in notes
    assert "file: " not in notes


def test_a_full_benchmark_needs_no_excuse():
    assert "not the full" not in "\n".join(table.notes({"a": summary("mathvista")}))


def test_categories_have_both_answers():
    one = summary("mathvision")
    for which, accuracy in (("first", 30.0), ("final", 45.0)):
        one["benchmark"][which]["tables"] = {
            "level": {"1|2": {"accuracy": accuracy, "total": 20, "correct": 6}},
            "subject": {str(i): {"accuracy": 1.0, "total": 1, "correct": 0} for i in range(41)},
        }
    text = table.categories(one)
    assert r"| 1\|2 | 20 | 30.0 | 45.0 |" in text
    assert "subject: 41 groups, left out here" in text
    assert table.categories(summary()) == ""


# ----------------------------------------------------------------------------------------- page


def item(i=0, first=True, final=True, **more):
    return {
        "id": f"item-{i}", "origin": f"f:{i}", "sample": 0, "prompt": f"Question {i}?",
        "gold": "60", "response": "all of it",
        "blocks": {"first_think": "think one", "first_answer": "59", "reflection": "check again",
                   "second_think": "think two", "second_answer": "60"},
        "first_answer": "59", "final_answer": "60", "first_correct": first,
        "final_correct": final, "format_ok": True, "truncated": False, "tokens": 99,
    } | more  # fmt: skip


class Reader(html.parser.HTMLParser):
    """The elements of a page, and the text of its articles and its list of categories."""

    VOID = {"meta", "img", "input", "br"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.articles, self.options = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "article":
            self.articles.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "article" in self.open:
            self.articles[-1] += data
        if "option" in self.open:
            self.options.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def test_the_page_shows_question_gold_both_rounds_and_verdicts():
    scored = item(first=False, extraction="60", prediction="60.0", mode="official_rule",
                  first_confidence=0.75, choices=["fifty", "sixty"])  # fmt: skip
    (text,) = Reader(eval_page.page([scored])).articles
    for part in ("item-0", "Question 0?", "60", "think one", "59", "check again", "think two",
                 "fifty", "99 tokens", "0.75", "fixed"):  # fmt: skip
        assert part in text
    assert re.search(r"First round\s+wrong", text)
    assert re.search(r"Second round\s+right", text)
    assert "extraction 60, prediction 60.0, by official_rule" in text
    assert "all of it" not in text


def test_a_response_without_the_format_is_shown_whole():
    (text,) = Reader(eval_page.page([item(format_ok=False)])).articles
    assert "all of it" in text
    (text,) = Reader(eval_page.page([item(blocks={})])).articles
    assert "all of it" in text
    assert "First round" not in text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["right"]),
        ({"first": False}, ["right", "fixed"]),
        ({"final": False}, ["wrong", "harmed"]),
        ({"first": False, "final": False}, ["wrong"]),
        ({"final_answer": None, "truncated": True}, ["right", "no answer", "truncated"]),
        ({"mode": "strict", "final_answer": None}, ["right"]),
        ({"mode": "official_rule", "no_answer": "names no option"}, ["right", "no answer"]),
    ],
)
def test_tags_say_what_became_of_an_item(fields, expected):
    assert eval_page.tags(item(**fields)) == expected


def test_a_row_scored_elsewhere_has_one_verdict():
    row = {"id": "7", "question": "Why?", "answer": "B", "response": "(B)", "correct": False}
    assert eval_page.tags(row) == ["wrong"]
    (text,) = Reader(eval_page.page([row])).articles
    for part in ("Why?", "B", "(B)", "wrong"):
        assert part in text


def test_text_of_models_and_data_is_escaped():
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    blocks = dict.fromkeys(item()["blocks"], evil)
    row = item(id=evil, prompt=evil, gold=evil, blocks=blocks, choices=[evil], extraction=evil,
               prediction=evil, no_answer=evil, categories={evil: [evil]}, format_ok=False,
               response=evil, benchmark=evil, mode=evil)  # fmt: skip
    text = eval_page.page([row])
    found = Reader(text)
    assert len(found.all("script")) == 1
    assert found.all("img") == []
    assert not any(key.startswith("on") for _, attrs in found.elements for key in attrs)
    assert found.articles[0].count(evil) == 17  # the category holds it twice


def test_filters_know_the_items_by_tags_and_categories():
    rows = [
        item(0, categories={"level": ["1"], "subject": ["area", "angle"]}, benchmark="mathvision"),
        item(1, final=False, categories={"level": ["2"]}),
    ]
    found = Reader(eval_page.page(rows))
    articles = found.all("article")
    assert [a["data-tags"] for a in articles] == ["right", "wrong|harmed"]
    values = [option["value"] for option in found.all("option")]
    by_name = dict(zip(found.options, values, strict=True))
    assert list(by_name) == ["all categories", "benchmark: mathvision", "level: 1", "level: 2",
                             "subject: angle", "subject: area"]  # fmt: skip
    zero = articles[0]["data-groups"].split("|")
    names = ("benchmark: mathvision", "level: 1", "subject: area", "subject: angle")
    assert zero == [by_name[name] for name in names]
    assert articles[1]["data-groups"] == by_name["level: 2"]
    boxes = [i["value"] for i in found.all("input") if i.get("type") == "checkbox"]
    assert boxes == list(eval_page.TAGS)


# As much of a browser as the page's script asks for; prints which items each choice shows.
BROWSER = """
const items = %s.map(([tags, groups, text]) => (
  {dataset: {tags, groups}, textContent: text, hidden: false}));
let ticked = [], update;
const form = {
  hidden: true, group: {value: ""}, text: {value: ""},
  querySelectorAll: () => ticked.map((value) => ({value})),
  addEventListener: (name, f) => { if (name === "input") update = f; },
};
const output = {};
globalThis.document = {
  getElementById: (id) => (id === "filters" ? form : output),
  querySelectorAll: () => items,
};
%s
const shown = %s.map(([tags, group, text]) => {
  ticked = tags; form.group.value = group; form.text.value = text; update();
  return [items.flatMap((item, i) => (item.hidden ? [] : [i])), output.textContent];
});
console.log(JSON.stringify([form.hidden, shown]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run JavaScript")
def test_filters_narrow_by_kind_category_and_text():
    script = re.search(r"<script>(.*)</script>", eval_page.page([item()]), re.DOTALL)[1]
    items = [["right|fixed", "0|11", "A Cat"], ["wrong|harmed|truncated", "1", "a dog"],
             ["right", "1", "cats"]]  # fmt: skip
    choices = {
        0: ([], "", ""), 1: (["right"], "", ""), 2: (["right", "wrong"], "", ""),
        3: (["right", "fixed"], "", ""), 4: (["wrong", "truncated"], "", ""),
        5: ([], "1", ""), 6: ([], "", "CAT"), 7: (["right"], "1", "cat"),
        8: (["no answer"], "", ""),
    }  # fmt: skip
    code = BROWSER % (json.dumps(items), script, json.dumps(list(choices.values())))
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    hidden, shown = json.loads(done.stdout)
    assert hidden is False
    assert [found for found, _ in shown] == [
        [0, 1, 2], [0, 2], [0, 1, 2], [0], [1], [1, 2], [0, 2], [2], []
    ]  # fmt: skip
    assert shown[1][1] == "2 of 3"


def test_without_javascript_everything_but_the_filters_is_there():
    found = Reader(eval_page.page([item(0), item(1)]))
    assert [form["id"] for form in found.all("form") if "hidden" in form] == ["filters"]
    assert not any("hidden" in article for article in found.all("article"))


def test_the_page_stands_alone_in_light_and_dark():
    text = eval_page.page([item()], lambda row: [Image.new("RGB", (4, 4))])
    assert not re.search(r"https?://|@import|url\(", text)
    assert found_sources(text)[0].startswith("data:image/")
    assert "prefers-color-scheme: dark" in text
    assert "default-src 'none'" in text


def found_sources(text):
    return [img["src"] for img in Reader(text).all("img")]


def test_images_are_thumbnails_of_the_items():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (600, 1200, 3), np.uint8))
    line = Image.new("RGBA", (30, 20), (255, 0, 0, 255))
    pictures = {"f:0": [noise, line], "f:1": []}
    text = eval_page.page([item(0), item(1)], lambda row: pictures[row["origin"]])
    first, second = found_sources(text)
    assert first.startswith("data:image/jpeg;base64,")  # a photo is smaller so
    assert second.startswith("data:image/png;base64,")
    large, small = (Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))) for s in
                    (first, second))  # fmt: skip
    assert large.size == (eval_page.THUMBNAIL, eval_page.THUMBNAIL // 2)
    assert small.size == (30, 20)
    assert small.getpixel((3, 3)) == (255, 0, 0)


def test_an_image_that_cannot_be_read_is_named_in_its_place():
    def broken(row):
        raise OSError("no such <file>")

    found = Reader(eval_page.page([item()], broken))
    assert "no image: no such <file>" in found.articles[0]
    assert "Question 0?" in found.articles[0]


def test_many_items_are_sampled_by_a_seed_and_keep_their_order():
    rows = [item(i) for i in range(40)]

    def shown(**settings):
        return [int(re.search(r"item-(\d+)", a)[1]) for a in
                Reader(eval_page.page(rows, **settings)).articles]  # fmt: skip

    ten = shown(limit=10)
    assert len(set(ten)) == 10
    assert ten == sorted(ten)
    assert ten == shown(limit=10, seed=0)
    assert ten != shown(limit=10, seed=1)
    assert ten != list(range(10))
    assert shown(limit=500) == list(range(40))
    assert "10 items, drawn at random from 40" in eval_page.page(rows, limit=10)


# -------------------------------------------------------------------------------------- command


def evaluation(folder, data, summary_json, scored=None, samples=1):
    """An evaluation folder of two problems; all answers are right."""
    rows = [
        item(i, origin=f"{data}:{i + 1}", sample=s, tokens_to_first=40, first_confidence=0.95)
        for i in range(2)
        for s in range(samples)
    ]
    write_jsonl(folder / "samples.jsonl", rows)
    if scored:
        write_jsonl(folder / "scored.jsonl", [scored(row) for row in rows])
    (folder / "summary.json").write_text(json.dumps(summary_json))
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """A file of two problems with an image each."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    rows = [{"id": f"item-{i}", "question": "?", "answer": "60", "image": f"{i}.png"}
            for i in range(2)]  # fmt: skip
    write_jsonl(folder / "test.jsonl", rows)
    return folder / "test.jsonl"


def report(tmp_path, *argv):
    """Exit code of the command, and the folder it wrote."""
    with pytest.raises(SystemExit) as caught:
        argv = [*argv, "--out", str(tmp_path / "out")]
        cli.run(eval_report.main, eval_report.make_parser(), argv)
    return caught.value.code, tmp_path / "out"


def test_the_command_writes_tables_numbers_and_page(tmp_path, data):
    folder = evaluation(tmp_path / "validation", data, summary(), samples=4)
    code, out = report(tmp_path, "--workdir", folder, "--items", "5")
    assert code == 0
    text = (out / "report.md").read_text()
    assert row_of(text, "validation")[4] == "50.0 (44.7 to 55.3)"
    assert "| 4 | 100.0 | 100.0 |" in text
    assert "| confident | 0.900 | 100.0 | 100.0 | 40.0 |" in text
    found = json.loads((out / "report.json").read_text())["evaluations"]["validation"]
    assert found["summary"] == summary()
    assert found["pass@k"] == {"1": 1.0, "2": 1.0, "4": 1.0}
    assert found["stop"]["points"]["final"]["tokens"] == 99.0
    html_text = (out / "items.html").read_text()
    assert html_text.count("<article") == 5
    assert len(found_sources(html_text)) == 5


def test_the_page_has_the_benchmarks_verdicts_where_there_are_any(tmp_path, data):
    def scored(row):
        return {"origin": row["origin"], "sample": row["sample"], "benchmark": "mathvision",
                "extraction": "61", "prediction": "61", "correct": False}  # fmt: skip

    folder = evaluation(tmp_path / "run", data, summary("mathvision"), scored)
    assert report(tmp_path, "--workdir", folder, "--no_images")[0] == 0
    found = Reader((tmp_path / "out" / "items.html").read_text())
    assert [a["data-tags"] for a in found.all("article")] == ["wrong|harmed"] * 2
    assert "extraction 61" in found.articles[0]
    assert "Question 0?" in found.articles[0]
    assert found.all("img") == []


def test_evaluations_are_told_apart(tmp_path, data):
    one = evaluation(tmp_path / "one", data, summary("mathvista"))
    two = evaluation(tmp_path / "two", data, summary("mathvista"))
    assert report(tmp_path, "--workdir", one, "--workdir", two, "--no_images")[0] == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["evaluations"]
    assert list(found) == ["mathvista (one)", "mathvista (two)"]
    options = Reader((tmp_path / "out" / "items.html").read_text()).options
    assert "evaluation: mathvista (one)" in options


def test_data_that_are_gone_leave_items_without_images(tmp_path, data):
    folder = evaluation(tmp_path / "run", data, summary())
    data.unlink()
    assert report(tmp_path, "--workdir", folder)[0] == 0
    found = Reader((tmp_path / "out" / "items.html").read_text())
    assert "no image" in found.articles[0]
    assert "is not there" in found.articles[0]


def test_a_folder_that_is_no_evaluation_is_an_error(tmp_path, capsys):
    assert report(tmp_path, "--workdir", str(tmp_path / "nowhere"))[0] == 1
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
