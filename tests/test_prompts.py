"""The prompts and targets say what the template asks for, braces intact."""

import re

import numpy as np
import pytest

from srpo_jax.data.encoders import SftEncoder, conversation_images, prompt_of, sft_response
from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Record
from srpo_jax.data.prompts import (
    PLAIN_SYSTEM_PROMPT,
    SYSTEM_PROMPT,
    TAGS,
    TEMPLATE,
    add_box,
    paper_sft_response,
    place_images,
    plain_messages,
    plain_response,
    srpo_messages,
    srpo_response,
    user_message,
)
from srpo_jax.structs import BLOCKS

FIVE = re.compile(
    r"\s*".join(rf"<{name}>(?P<b{i}>.+?)</{name}>" for i, name in enumerate(TEMPLATE)), re.DOTALL
)


def test_the_template_names_the_blocks_of_structs():
    assert len(TEMPLATE) == len(BLOCKS)
    for name, block in zip(TEMPLATE, BLOCKS, strict=True):
        assert block == name or block.endswith("_" + name)
    assert TAGS["reflection"] == ("<reflection>", "</reflection>")


def test_the_worked_example_of_the_prompt_holds_the_template():
    example = SYSTEM_PROMPT[SYSTEM_PROMPT.index("Example.") :]
    found = FIVE.search(example)
    assert found and example.endswith(found[0])
    assert found["b1"] == "$3 + 4 = \\boxed{7}$" and found["b4"] == "$3 \\times 4 = \\boxed{12}$"
    assert "\\\n" not in SYSTEM_PROMPT and "\b" not in SYSTEM_PROMPT  # \boxed, not a backspace
    plain = PLAIN_SYSTEM_PROMPT[PLAIN_SYSTEM_PROMPT.index("Example.") :]
    assert re.search(r"<think>.+</think>\n<answer>\$.*\\boxed\{12\}\$</answer>$", plain)
    assert "reflection" not in PLAIN_SYSTEM_PROMPT


def test_messages_hold_the_system_prompt_and_the_user_turn():
    messages = srpo_messages("Find {x} in %s.", 1)
    assert [m["role"] for m in messages] == ["system", "user"]
    assert messages[0]["content"] == SYSTEM_PROMPT
    assert messages[1]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "Find {x} in %s."},
    ]
    assert plain_messages("q")[0]["content"] == PLAIN_SYSTEM_PROMPT
    assert plain_messages("q")[1] == {"role": "user", "content": "q"}


def test_images_stand_at_their_marks_else_first():
    kinds = [p.get("text", "IMAGE") for p in user_message("a <image> b <image>", 2)["content"]]
    assert kinds == ["a ", "IMAGE", " b ", "IMAGE"]
    kinds = [p.get("text", "IMAGE") for p in user_message("<image>\nWhat?", ["i"])["content"]]
    assert kinds == ["IMAGE", "\nWhat?"]
    kinds = [p.get("text", "IMAGE") for p in user_message("What?", 3)["content"]]
    assert kinds == ["IMAGE"] * 3 + ["What?"]
    for question, count in (("<image>", 2), ("<image> <image>", 1), ("<image>", 0)):
        with pytest.raises(ValueError, match="marks in the question"):
            user_message(question, count)


def test_marks_in_choices_are_places_too():
    parts = user_message("Which? <image>", 3, ["<image 2>", "no", "<image3>"])["content"]
    assert [part.get("text", "IMAGE") for part in parts] == [
        "Which? ", "IMAGE", "\nChoices:\n(A) ", "IMAGE", "\n(B) no\n(C) ", "IMAGE",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"2 <image> marks .* but 1 images .*write \\<image>"):
        user_message("<image>", 1, ["<image>"])


def test_images_come_in_the_order_of_their_marks():
    numbered = {1: "one", 2: "two", 4: "four"}
    placed = place_images("<image 4>, <image>, <image 4>", ["<image_2>", "x"], numbered)
    assert placed == ("<image>, <image>, image 4", ["<image 3>", "x"], ["four", "one", "two"])
    assert place_images("q", ["a"], numbered) == ("q", ["a"], ["one", "two", "four"])
    with pytest.raises(ValueError, match="a mark for image 3, but 3 images"):
        place_images("<image 3>", [], numbered)


@pytest.mark.parametrize("count", [0, 1])
def test_an_escaped_mark_is_text(count):
    content = user_message(r"\<image> \\\<image 2> \\" + "<image>" * count, count)["content"]
    text = content if count == 0 else content[0]["text"]
    assert text == r"<image> \\<image 2> \\" and (count == 0 or content[1] == {"type": "image"})


def test_choices_are_lettered():
    content = user_message("Which?", 1, ["57", "{n}"])["content"]
    assert content[1]["text"] == "Which?\nChoices:\n(A) 57\n(B) {n}"
    assert user_message("Which?", 0, ["57"])["content"] == "Which?\nChoices:\n(A) 57"
    content = user_message("Which is it? <image>", 1, ["x"])["content"]
    assert content[-1]["text"] == "\nChoices:\n(A) x"
    with pytest.raises(ValueError, match="only 26"):
        user_message("q", 0, ["x"] * 27)


def test_boxed_wraps_once():
    assert add_box("7") == "$\\boxed{7}$"
    assert add_box("2 \\sqrt{21}") == "$\\boxed{2 \\sqrt{21}}$"
    assert add_box("$x^2$") == "$\\boxed{x^2}$"
    assert add_box("so $\\boxed{7}$") == "so $\\boxed{7}$"
    assert add_box("$a$ and $b$") == "$\\boxed{$a$ and $b$}$"


def test_responses_hold_their_blocks():
    response = srpo_response(" t1 ", "3", "r", "t2", "\\frac{1}{2}")
    found = FIVE.fullmatch(response)
    assert found.groups() == ("t1", "$\\boxed{3}$", "r", "t2", "$\\boxed{\\frac{1}{2}}$")
    assert paper_sft_response("t", "a", "r", "g") == (
        "<think>t</think>\n<answer>a</answer>\n<reflection>r</reflection>\n<answer>g</answer>"
    )
    assert plain_response("t", "g") == "<think>t</think>\n<answer>$\\boxed{g}$</answer>"


def test_blank_blocks_and_nested_tags_are_refused():
    for hole in range(5):
        blocks = ["x"] * 5
        blocks[hole] = " \n"
        with pytest.raises(ValueError, match=f"the {TEMPLATE[hole]} block is empty|answer block"):
            srpo_response(*blocks)
    with pytest.raises(ValueError, match="the think block holds the tag </think>"):
        srpo_response("a </think> b", "3", "r", "t", "3")
    with pytest.raises(ValueError, match="empty"):
        paper_sft_response("t", "a", "r", " ")
    with pytest.raises(ValueError, match="empty"):
        plain_response("t", "")


def _record(**extra):
    return Record("1", "q", "12", extra=extra, origin="d.jsonl:3")


REFLECTION = {
    "first_think": "a",
    "first_answer": "7",
    "reflection": "wrong",
    "second_think": "b",
    "second_answer": "12",
}


def test_sft_targets():
    record = _record(**REFLECTION)
    assert sft_response(record, "rl_aligned") == srpo_response("a", "7", "wrong", "b", "12")
    assert sft_response(record, "paper") == paper_sft_response("a", "7", "wrong", "12")
    assert sft_response(record, "plain") == plain_response("b", "12")
    found = FIVE.fullmatch(sft_response(_record(), "gold"))
    assert found["b1"] == found["b4"] == "$\\boxed{12}$"
    with pytest.raises(RecordError, match=r"d.jsonl:3: no text in the fields \['first_think'"):
        sft_response(_record(), "rl_aligned")
    with pytest.raises(RecordError, match="d.jsonl:3: the reflection block is empty"):
        sft_response(_record(**{**REFLECTION, "reflection": " "}), "rl_aligned")
    with pytest.raises(ValueError, match="choose one of rl_aligned, paper, plain, gold"):
        sft_response(record, "other")


def test_the_adaptive_target_is_one_round_where_the_record_has_no_reflection():
    first = {"first_think": "a", "first_answer": "12", "first_correct": True}
    rest = dict.fromkeys(("reflection", "second_think", "second_answer"))
    for extra in (first, first | rest):
        assert sft_response(_record(**extra), "adaptive") == plain_response("a", "12")
    full = _record(**REFLECTION)
    assert sft_response(full, "adaptive") == sft_response(full, "rl_aligned")
    with pytest.raises(RecordError, match="one round, and its answer is wrong"):
        sft_response(_record(**first | {"first_correct": False}), "adaptive")
    with pytest.raises(RecordError, match=r"no text in the fields \['second_think'"):
        sft_response(_record(**first | {"reflection": "hm"}), "adaptive")
    assert [prompt_of(t) for t in ("adaptive", "plain", "gold")] == ["adaptive", "plain", "srpo"]


def test_only_wrong_first_attempts_are_masked():
    class Spy:
        def encode_conversation(self, messages, images, *, mask_first_attempt, origin):
            return mask_first_attempt

    for first_correct, expected in ((False, True), (True, False), (None, False)):
        record = _record(**REFLECTION, first_correct=first_correct)
        assert SftEncoder(Spy(), mask_wrong_first=True)(record) is expected
        assert SftEncoder(Spy(), mask_wrong_first=False)(record) is False
    for first_correct in ("no", "wrong", 2, [False]):
        record = _record(**REFLECTION, first_correct=first_correct)
        with pytest.raises(RecordError, match="first_correct is .*; write true or false"):
            SftEncoder(Spy(), mask_wrong_first=True)(record)
    for first_correct, expected in (("FALSE", True), ("0", True), ("True", False), (np.nan, False)):
        record = _record(**REFLECTION, first_correct=first_correct)
        assert SftEncoder(Spy(), mask_wrong_first=True)(record) is expected


def test_conversation_images_in_order(tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text"}]},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": [{"type": "image", "image": "b.png"}]},
    ]
    refs = conversation_images(messages, str(tmp_path), "c:1")
    assert [r.path for r in refs] == ["a.png", "b.png"] and refs[0].root == str(tmp_path)
    with pytest.raises(RecordError, match="neither a path nor bytes"):
        conversation_images([{"role": "user", "content": [{"type": "image"}]}], "", "c:1")
