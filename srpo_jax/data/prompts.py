"""The words of the method: system prompts, the five-block template, chat messages.

Plain strings, joined and never formatted, so that the braces of LaTeX stay what they are.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, TypeVar

# The blocks of a response in their order (structs.BLOCKS names them) and the tags of each.
TEMPLATE = ("think", "answer", "reflection", "think", "answer")
TAGS = {name: (f"<{name}>", f"</{name}>") for name in ("think", "answer", "reflection")}
IMAGE_MARK = "<image>"
# Where an image goes, by its number or next in turn. Behind a single backslash the mark is text;
# two are a line break of LaTeX.
_MARK = re.compile(r"(?<!\\)(?P<before>(?:\\\\)*)(?P<escape>\\?)<image[ _]?(?P<number>\d*)>")
Message = dict[str, Any]  # role and content, as Hugging Face's chat templates take them
T = TypeVar("T")

# Tokens of Qwen2.5-VL with a meaning of their own; text of a record must hold none of them.
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
VISION_MARKERS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)
CONTROL_TOKENS = VISION_MARKERS + ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

SYSTEM_PROMPT = r"""You solve problems about images in two rounds and look critically at your own \
work in between. Write exactly five blocks, in this order, with nothing before, between or after \
them except line breaks:

1. <think> ... </think> Your first reasoning: look at the image, state what you need from it, and \
work step by step.
2. <answer> ... </answer> Your first answer: LaTeX between dollar signs, with the result itself in \
\boxed{ }. For multiple choice, box the letter.
3. <reflection> ... </reflection> An honest review of the reasoning and the answer above: check \
what you read from the image, each step and the final result; name every error, gap or unclear \
step, or say what makes the result certain; say what to do better.
4. <think> ... </think> Your second reasoning: a full new solution that uses the review. It must \
improve on the first one even if the answer stays the same.
5. <answer> ... </answer> Your final answer, written as in block 2.

Never leave out a block, never leave one empty, and use each pair of tags only as shown.

Example. Problem: A shelf in the picture holds 3 rows of 4 cups. How many cups are there?
<think>There are 3 rows and each row holds 4 cups, so I add 3 + 4 = 7.</think>
<answer>$3 + 4 = \boxed{7}$</answer>
<reflection>I read the picture correctly, 3 rows and 4 cups in each, but rows of equal size are \
multiplied, not added. The first answer is wrong.</reflection>
<think>Each of the 3 rows holds 4 cups, so there are 3 times 4 cups. Counting row by row gives 4, \
8, 12, which agrees.</think>
<answer>$3 \times 4 = \boxed{12}$</answer>""".replace("\\\n", "")

ADAPTIVE_SYSTEM_PROMPT = r"""You solve problems about images and look critically at your own work \
where that is needed. First write two blocks:

1. <think> ... </think> Your reasoning: look at the image, state what you need from it, and work \
step by step.
2. <answer> ... </answer> Your answer: LaTeX between dollar signs, with the result itself in \
\boxed{ }. For multiple choice, box the letter.

If you are certain of that answer, end there. Otherwise go on with three more:

3. <reflection> ... </reflection> An honest review of the reasoning and the answer above: check \
what you read from the image, each step and the final result; name every error, gap or unclear \
step, or say what makes the result certain.
4. <think> ... </think> A full new solution that uses the review.
5. <answer> ... </answer> Your final answer, written as in block 2.

Write nothing before, between or after the blocks except line breaks, never leave one empty, and \
use each pair of tags only as shown.""".replace("\\\n", "")

PLAIN_SYSTEM_PROMPT = r"""You solve problems about images. First reason step by step inside \
<think> </think>, then give the result inside <answer> </answer> as LaTeX between dollar signs, \
with the result itself in \boxed{ }. For multiple choice, box the letter. Write nothing else.

Example. Problem: A shelf in the picture holds 3 rows of 4 cups. How many cups are there?
<think>There are 3 rows and each row holds 4 cups, so there are 3 times 4 cups.</think>
<answer>$3 \times 4 = \boxed{12}$</answer>""".replace("\\\n", "")


def letter(index: int) -> str:
    """The letter of choice ``index``, A for 0; ValueError beyond Z."""
    if not 0 <= index < 26:
        raise ValueError(f"choice {index}: only 26 choices have letters")
    return chr(ord("A") + index)


def question_text(question: str, choices: Sequence[str] = ()) -> str:
    """The question, followed by its choices as lines "(A) ..."."""
    lines = [f"({letter(i)}) {choice}" for i, choice in enumerate(choices)]
    return "\n".join([question.strip(), "Choices:", *lines]) if lines else question.strip()


def place_images(
    question: str, choices: Sequence[str], images: dict[int, T]
) -> tuple[str, list[str], list[T]]:
    """Question and choices with their marks, and the images, by number, in the order of the marks.

    Marks are ``<image>`` (the next one), ``<image 2>``, ``<image2>`` and ``<image_2>``. They become
    ``<image>`` in the question and ``<image k>``, k counted in the new order, in the choices, which
    stay different texts. An image that is named again becomes words, "image 2"; images without a
    mark come last. ValueError for a number without an image, unless there is only one image: such a
    one shows all that have numbers (MathVision), and further numbers are words.
    """
    order: list[int] = []

    def place(match: re.Match, numbered: bool) -> str:
        left = [number for number in images if number not in order]
        number = int(match["number"]) if match["number"] else next(iter(left), None)
        if match["escape"] or number is None:
            return match[0]
        if number not in images and len(images) != 1:
            raise ValueError(
                f"a mark for image {number}, but {len(images)} images (where the words are meant, "
                f"write \\<image {number}>)"
            )
        if number not in left:
            return f"{match['before']}image {number}"
        order.append(number)
        return match["before"] + (f"<image {len(order)}>" if numbered else IMAGE_MARK)

    question = _MARK.sub(lambda match: place(match, False), question)
    choices = [_MARK.sub(lambda match: place(match, True), choice) for choice in choices]
    order += [number for number in images if number not in order]
    return question, choices, [images[number] for number in order]


def split_at_marks(text: str) -> list[str]:
    """The pieces of a text between its image marks; escaped marks are text, without backslash."""
    pieces, start = [""], 0
    for match in _MARK.finditer(text):
        pieces[-1] += text[start : match.end("before")]
        if match["escape"]:
            pieces[-1] += match[0][len(match["before"]) + 1 :]
        else:
            pieces.append("")
        start = match.end()
    pieces[-1] += text[start:]
    return pieces


def user_message(
    question: str, images: int | Sequence[Any] = 0, choices: Sequence[str] = ()
) -> Message:
    """One user turn in Hugging Face's form, each image part at its mark in question or choices.

    ``images`` is how many there are, or a sequence of them (only counted: pixels travel beside
    the messages), in the order of the marks. Without marks the images come first. ValueError when
    marks and images differ in number.
    """
    count = images if isinstance(images, int) else len(images)
    # White space around marks is the author's.
    pieces = split_at_marks(question.rstrip() + question_text("", choices))
    marks = len(pieces) - 1
    if marks not in (0, count):
        raise ValueError(
            f"{marks} {IMAGE_MARK} marks in the question, but {count} images (where the word is "
            f"meant, write \\{IMAGE_MARK})"
        )
    if count == 0:
        return {"role": "user", "content": pieces[0].lstrip()}
    if marks == 0:
        pieces = [""] * count + pieces
    pieces[0] = pieces[0].lstrip()
    parts: list[dict[str, str]] = []
    for k, piece in enumerate(pieces):
        if k:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return {"role": "user", "content": parts}


def _messages(
    system: str, question: str, images: int | Sequence[Any] = 0, choices: Sequence[str] = ()
) -> list[Message]:
    """A system turn and the user's turn (see ``user_message``)."""
    return [{"role": "system", "content": system}, user_message(question, images, choices)]


srpo_messages = functools.partial(_messages, SYSTEM_PROMPT)  # the five-block template
plain_messages = functools.partial(_messages, PLAIN_SYSTEM_PROMPT)  # the baselines: one round
# One round or five blocks, as the policy sees fit.
adaptive_messages = functools.partial(_messages, ADAPTIVE_SYSTEM_PROMPT)
# How a template's prompt is called in configurations and on command lines.
MESSAGES = {"srpo": srpo_messages, "plain": plain_messages, "adaptive": adaptive_messages}


def add_box(answer: str) -> str:
    r"""The answer as the template wants it, ``$\boxed{...}$``; untouched if it holds a box."""
    answer = answer.strip()
    if "\\boxed" in answer:
        return answer
    if len(answer) > 2 and answer[0] == answer[-1] == "$" and "$" not in answer[1:-1]:
        answer = answer[1:-1]
    return "$\\boxed{" + answer + "}$"


def block(name: str, content: str) -> str:
    """``<name>content</name>``; ValueError for blank content or content that holds a tag."""
    content = content.strip()
    if not content:
        raise ValueError(f"the {name} block is empty")
    found = re.search(r"</?(?:think|answer|reflection)>", content)
    if found:
        raise ValueError(f"the {name} block holds the tag {found[0]}")
    opening, closing = TAGS[name]
    return opening + content + closing


def srpo_response(
    first_think: str, first_answer: str, reflection: str, second_think: str, second_answer: str
) -> str:
    """A response in the five-block template, one block a line; plain answers are boxed.

    ValueError when a block is blank or holds a tag.
    """
    if not first_answer.strip() or not second_answer.strip():
        raise ValueError("the answer block is empty")
    first, second = add_box(first_answer), add_box(second_answer)
    contents = (first_think, first, reflection, second_think, second)
    return "\n".join(block(name, text) for name, text in zip(TEMPLATE, contents, strict=True))


def review_prefix(think: str, answer: str) -> str:
    """The first two blocks of a response and the opening of its third: where a review goes on.

    ValueError as in ``srpo_response``.
    """
    return plain_response(think, answer) + "\n" + TAGS["reflection"][0]


def paper_sft_response(think: str, first_answer: str, reflection: str, gold: str) -> str:
    """The paper's own SFT target (appendix B.4): one think, two answers, the second the bare gold.

    It lacks the second think and the boxes that the RL template rewards; ``srpo_response`` closes
    that gap. ValueError as there.
    """
    names, contents = ("think", "answer", "reflection", "answer"), (think, first_answer, reflection)
    return "\n".join(block(n, c) for n, c in zip(names, (*contents, gold), strict=True))


def plain_response(think: str, answer: str) -> str:
    """The one-round target of ``plain_messages``; ValueError as in ``srpo_response``."""
    if not answer.strip():
        raise ValueError("the answer block is empty")
    return "\n".join([block("think", think), block("answer", add_box(answer))])
