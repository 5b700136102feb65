"""What policy, judge and teacher are asked, and which replies count."""

import base64
import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from srpo_jax.data.fields import Record
from srpo_jax.data.images import ImageRef
from srpo_jax.reflection import teach
from srpo_jax.reflection.settings import Settings
from tests.data_helpers import noise_image

GOLD = "4242"
ATTEMPT = {"think": "I see six of them.", "answer": "6", "correct": False}


def record(**more) -> Record:
    buffer = io.BytesIO()
    noise_image(90, 61, seed=1).save(buffer, "PNG")
    image = ImageRef("file:1", data=buffer.getvalue())
    fields = dict(id="r", question="How many?", answer=GOLD, images=(image,), origin="file:1")
    return Record(**{**fields, **more})


def said(request) -> str:
    """All text of a request."""
    return json.dumps([m for m in request.messages if isinstance(m["content"], str)]) + json.dumps(
        [p for m in request.messages if isinstance(m["content"], list) for p in m["content"]]
    )


def test_images_are_sent_at_the_size_that_transformers_gives_them():
    smart_resize = pytest.importorskip(
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"
    ).smart_resize
    rng = np.random.default_rng(0)
    for _ in range(3000):
        width, height = (int(10 ** rng.uniform(0.0, 3.6)) for _ in range(2))
        if max(width, height) <= 200 * min(width, height):
            want = smart_resize(height, width, 28, 3_136, 501_760)[::-1]
            assert teach.sent_size(width, height, 3_136, 501_760) == want, (width, height)
    url = teach.data_url(noise_image(90, 61, seed=1), 3_136, 501_760)
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert sent.size == (84, 56)


def test_the_gold_is_told_in_gold_given_only():
    prompts = teach.Prompts()
    for mode, told in (("gold_given", True), ("gold_blind", False), ("self", False)):
        for correct in (True, False):
            first = {**ATTEMPT, "correct": correct}
            request = teach.reflect_request(record(), 0, first, 0, Settings(mode=mode), prompts)
            assert (GOLD in said(request)) is told


def test_right_and_wrong_attempts_get_two_instructions_and_blind_ones_the_same():
    prompts = teach.Prompts()

    def asked(mode, correct):
        first = {**ATTEMPT, "correct": correct}
        return said(teach.reflect_request(record(), 0, first, 0, Settings(mode=mode), prompts))

    assert asked("gold_given", True) != asked("gold_given", False)
    assert "shorter" in asked("gold_given", True)
    assert "Diagnose" in asked("gold_given", False)
    assert asked("gold_blind", True) == asked("gold_blind", False)


def test_the_policy_gets_the_templates_own_prompt_with_images_in_their_places():
    two = record().images * 2
    question = "Compare <image> with <image>."
    request = teach.attempt_request(
        record(question=question, images=two), 0, 0, Settings(attempt_prompt="srpo")
    )
    assert request.messages[0]["role"] == "system"
    assert [p["type"] for p in request.messages[1]["content"]] == [
        "text", "image_url", "text", "image_url", "text",
    ]  # fmt: skip
    assert (request.temperature, request.max_tokens) == (0.2, 1024)  # the paper's


def test_every_try_has_a_seed_of_its_own_and_every_run_the_same():
    tries = itertools.product(("attempt", "reflect"), range(20), range(5))
    seeds = {teach.request_seed(0, *one) for one in tries}
    assert len(seeds) == 200
    assert teach.request_seed(0, "attempt", 7, 1) == teach.request_seed(0, "attempt", 7, 1)
    assert max(seeds) < 2**31


def test_prompt_files_of_a_folder_replace_ours_and_a_missing_one_is_named(tmp_path):
    for name in teach.Prompts().names:
        (tmp_path / name).write_text("mine {{ question }}" if name == "blind.jinja" else "x")
    prompts = teach.Prompts(str(tmp_path))
    assert prompts.render("blind", question="{{ 7 * 6 }} $\\boxed{1}$") == (
        "mine {{ 7 * 6 }} $\\boxed{1}$"  # what a record says is text, never a template
    )
    assert prompts.hashes() != teach.Prompts().hashes()
    (tmp_path / "wrong.jinja").unlink()
    with pytest.raises(ValueError, match="no wrong.jinja"):
        teach.Prompts(str(tmp_path))
    (tmp_path / "wrong.jinja").write_text("{{ nonsense }}")
    with pytest.raises(ValueError, match="wrong.jinja: 'nonsense' is undefined"):
        teach.Prompts(str(tmp_path)).render("wrong", question="q")
