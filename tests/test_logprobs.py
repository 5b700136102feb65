"""tools.logprobs against transformers, through files as a user meets them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from srpo_jax.model.sharding import make_mesh
from tests.data_helpers import hf_processor, noise_image
from tests.tool_helpers import SIZES, read_jsonl, write_hf
from tools import logprobs
from tools.lib import loading


def image(path: str) -> dict:
    return {"type": "image", "image": path}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


IMAGES = {"tiny.png": (28, 28), "large.png": (1000, 700), "thin.png": (2800, 28), "a.png": (90, 61)}
SAID = {"role": "assistant", "content": "<think>the dots</think><answer>12</answer>"}
CONVERSATIONS = [
    {"id": 1, "messages": [{"role": "user", "content": "What is the sum?"}, SAID]},
    {"id": "two", "messages": [user(image("tiny.png"), image("large.png"), text("the sum")), SAID]},
    {
        "id": "three",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            user(image("a.png"), text("and then"), image("thin.png"), image("tiny.png")),
            {"role": "assistant", "content": "The picture is thin."},
            user(text("Think, answer and reflect.")),
            SAID,
        ],
    },
    {"messages": [user(text("the picture"), image("a.png"))]},  # nobody has answered
]


def write_conversations(folder: Path) -> Path:
    for seed, (name, size) in enumerate(IMAGES.items()):
        noise_image(*size, seed=seed).save(folder / name)
    path = folder / "conversations.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in CONVERSATIONS) + "\n")
    return path


def run(*arguments: str) -> None:
    logprobs.main(logprobs.make_parser().parse_args([str(a) for a in arguments]))


def expected_logprobs(hf_dir: Path, folder: Path) -> list[tuple[list[int], np.ndarray]]:
    """transformers, one conversation at a time."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        hf_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = hf_processor(hf_dir)
    image_id = model.config.image_token_id
    found = []
    for row in CONVERSATIONS:
        parts = [p for m in row["messages"] if isinstance(m["content"], list) for p in m["content"]]
        images = [Image.open(folder / p["image"]) for p in parts if p["type"] == "image"]
        rendered = processor.apply_chat_template(row["messages"], tokenize=False)
        inputs = dict(processor(text=[rendered], images=images or None, return_tensors="pt"))
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_id).int()
        with torch.no_grad():
            logits = model(**inputs).logits[0].double()
        ids = inputs["input_ids"][0]
        logps = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0]
        found.append((ids.tolist(), logps.numpy()))
    return found


@pytest.mark.parametrize("size", list(SIZES))
def test_log_probabilities_equal_those_of_transformers(tmp_path, monkeypatch, size):
    hf_dir, conversations = write_hf(tmp_path, size), write_conversations(tmp_path)
    expected = expected_logprobs(hf_dir, tmp_path)
    monkeypatch.setattr(loading, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
    before = logprobs.conversation_logps._cache_size()
    out = tmp_path / "out.jsonl"
    run("--hf_dir", hf_dir, "--input", conversations, "--output", out, "--batch_size", 3)
    assert logprobs.conversation_logps._cache_size() <= before + 2  # two batches, two buckets
    rows = read_jsonl(out)
    assert [row["id"] for row in rows] == [1, "two", "three", 7]  # the last: its line
    for row, (token_ids, logps) in zip(rows, expected, strict=True):
        assert row["token_ids"] == token_ids
        assert row["logprobs"][0] is None
        np.testing.assert_allclose(row["logprobs"][1:], logps, atol=1e-4, rtol=0)
    assert min(logps.min() for _, logps in expected) < -8  # the weights do say something
    assert len(rows[1]["token_ids"]) > 900  # all of the large image's tokens are there
