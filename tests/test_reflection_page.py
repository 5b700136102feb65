"""The inspection page stands alone, is well formed and runs nothing that a model wrote."""

import base64
import hashlib
import io
import re

import pytest
from page_helpers import EVIL, Page
from PIL import Image

from srpo_jax.report import reflection_page


def item(**changed):
    return {
        "id": "puzzle-1",
        "question": "Which number is missing?",
        "choices": ["6", "12"],
        "answer": "B",
        "images": [Image.new("RGB", (1200, 300), "skyblue")],
        "attempt": {"think": "3 + 4", "answer": "$\\boxed{7}$", "correct": False},
        "reflection": "The rows are multiplied.",
        "second_think": "3 times 4",
        "second_answer": "$\\boxed{12}$",
        "accepted": True,
        "reasons": [],
        "teacher": "teacher-1",
    } | changed


def page(items, title="Title", summary=None):
    return Page(reflection_page.page(items, title, summary or {}))


def test_every_part_of_an_item_is_shown():
    found = page([item()], summary={"accepted": 12345, "mix": {"right": 1, "wrong": 2}})
    text = " ".join(found.texts)
    for part in (
        *("puzzle-1", "Which number is missing?", "(A) 6", "(B) 12", "3 + 4", "$\\boxed{7}$"),
        *("The rows are multiplied.", "3 times 4", "$\\boxed{12}$", "teacher-1", "wrong"),
        *("12,345", "right 1, wrong 2"),
    ):
        assert part in text
    assert [attrs.get("class") for attrs in found.all("li")] == [None, "gold"]


def test_nothing_a_model_wrote_runs():
    parts = dict.fromkeys(["id", "question", "answer", "reflection", "teacher"], EVIL)
    parts |= {"second_think": EVIL, "second_answer": EVIL, "choices": [EVIL, "x"]}
    parts |= {"attempt": {"think": EVIL, "answer": EVIL, "correct": False}, "reasons": [EVIL]}
    found = page([item(**parts, accepted=False)], EVIL, {EVIL: EVIL})
    assert len(found.all("script")) == 1
    assert len(found.all("img")) == 1
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert sum(EVIL in text for text in found.texts) >= 12


def test_only_the_pages_own_script_is_allowed():
    html = reflection_page.page([item()], "Title", {})
    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = Page(html).all("meta")[2]["content"]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_the_page_asks_for_nothing_from_outside():
    found = page([item()])
    for _, attrs in found.tags:
        assert "href" not in attrs
        assert attrs.get("src", "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?://", " ".join(found.texts))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "CMYK", "I;16"])
def test_images_of_any_mode_become_small_thumbnails(mode):
    found = page([item(images=[Image.new(mode, (1200, 300))])])
    data = base64.b64decode(found.all("img")[0]["src"].partition("base64,")[2])
    assert Image.open(io.BytesIO(data)).size == (512, 128)


def test_items_can_be_filtered_by_state_and_reason():
    items = [
        item(),
        item(accepted=False, reasons=["try 1: leaked gold", "try 2: leaked gold"]),
        item(accepted=False, reasons=["try 1: second answer wrong", "try 2: leaked gold"]),
    ]
    found = page(items)
    tags = [attrs["data-tags"].split() for attrs in found.all("article")]
    assert tags[0] == ["all", "accepted"]
    assert tags[1] == ["all", "rejected", "reason-0"]
    assert tags[2] == ["all", "rejected", "reason-1", "reason-0"]
    buttons = [attrs["data-tag"] for attrs in found.all("button")]
    assert buttons == ["all", "accepted", "rejected", "reason-0", "reason-1"]
    text = " ".join(found.texts)
    for label in ("all (3)", "accepted (1)", "rejected (2)", "leaked gold (2)"):
        assert label in text


def test_without_javascript_everything_is_visible():
    found = page([item(), item(accepted=False)])
    assert all("hidden" not in attrs for attrs in found.all("article"))
    assert "hidden" in found.all("nav")[0]


def test_odd_characters_do_not_stop_the_page():
    odd = "half \ud83d, zero \0, right to left \u202e, \u2028 end"
    found = page([item(reflection=odd, choices=[], images=[], second_answer="")])
    assert "\0" not in "".join(found.texts)
    assert found.all("img") == []


def test_a_page_without_items_says_so():
    assert "No items yet." in page([]).texts


def test_a_missing_part_is_an_error():
    broken = item()
    del broken["answer"]
    with pytest.raises(KeyError):
        page([broken])


def test_the_same_items_give_the_same_page():
    one, two = (reflection_page.page([item()], "Title", {"n": 1}) for _ in range(2))
    assert one == two
