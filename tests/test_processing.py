"""Token ids, pixels, counts, loss masks and batches, exactly as Hugging Face's processor."""

import json
import pickle
import re

import numpy as np
import pytest
from data_helpers import hf_processor, make_hf_dir, noise_image

from srpo_jax.data.batching import FirstFit, Media, collate, collate_packed, encode_arrays
from srpo_jax.data.errors import RecordError
from srpo_jax.data.processing import Processor, token_bytes
from srpo_jax.data.prompts import srpo_messages, srpo_response
from srpo_jax.data.vision_arrays import VisionIds, mrope_positions

PIXELS = {"min_pixels": 3136, "max_pixels": 50_176}
SIZES = [(56, 56), (100, 37), (500, 400), (1, 90), (3, 200), (28, 28), (1, 1), (700, 7)]


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return make_hf_dir(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def processor(hf_dir):
    return Processor(hf_dir, **PIXELS)


@pytest.fixture(params=["small", "real"])
def any_dir(request, hf_dir):
    if request.param == "small":
        return hf_dir
    return request.getfixturevalue("shared_data") / "tokenizer_qwen2_5_vl"


def _raster(encoded):
    """The patches back in HF's order."""
    unit = 4
    where = (encoded.vision.merge_src[:, None] * unit + np.arange(unit)).ravel()
    return encoded.vision.patches[where]


def _user(*parts):
    content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    return {"role": "user", "content": content}


def _learned(processor, encoded):
    """The text that the loss covers."""
    table = token_bytes(processor.tokenizer)
    ids = encoded.token_ids[encoded.loss_mask > 0]
    return b"".join(table[i] for i in ids).decode()


def test_ids_counts_and_pixels_equal_hf(any_dir):
    ours, theirs = Processor(any_dir, **PIXELS), hf_processor(any_dir, **PIXELS)
    images = [noise_image(w, h, seed=w) for w, h in SIZES]
    messages = [
        {"role": "system", "content": "Think é, 中文 and \\boxed{ }.\n"},
        _user("First ", *[x for _ in images for x in (None, " and\n\n")], "what is 12+30?"),
    ]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = theirs(text=[text], images=images, return_tensors="np")
    encoded = ours.encode_prompt(messages, images)
    assert encoded.token_ids.tolist() == np.asarray(expected["input_ids"])[0].tolist()
    assert (encoded.grid == expected["image_grid_thw"]).all()
    assert (encoded.token_ids == ours.image_token_id).sum() == encoded.vision.num_merged
    assert encoded.vision.num_merged == encoded.grid.prod(-1).sum() // 4
    assert (_raster(encoded) == expected["pixel_values"]).all()  # exact, not close
    assert not encoded.loss_mask.any()


def test_positions_follow_the_images(processor):
    images = [noise_image(112, 56), noise_image(56, 140)]
    encoded = processor.encode_prompt([_user(None, "and", None, "?")], images)
    expected, next_pos = mrope_positions(
        encoded.token_ids,
        processor.ids,
        encoded.grid,
    )
    assert (encoded.mrope == expected).all() and encoded.next_pos == next_pos
    is_image = encoded.token_ids == processor.image_token_id
    assert encoded.vision_src[is_image].tolist() == list(range(8 + 10))
    assert (encoded.vision_src[~is_image] == -1).all()


def test_text_only_prompts_have_plain_positions_and_no_patches(processor):
    encoded = processor.encode_prompt([{"role": "user", "content": "2+2?"}])
    assert encoded.num_slots == 0 and encoded.vision.patches.shape == (0, 1176)
    assert (encoded.mrope == np.arange(encoded.num_tokens)).all()
    assert encoded.next_pos == encoded.num_tokens


def test_pixel_limits_are_the_explicit_ones(hf_dir):
    image = noise_image(1000, 1000)
    for limit in (50_176, 200_704):
        encoded = Processor(hf_dir, min_pixels=3136, max_pixels=limit).encode_prompt(
            [_user(None)], [image]
        )
        assert encoded.grid.prod() * 14 * 14 <= limit < encoded.grid.prod() * 14 * 14 * 1.3
    small = Processor(hf_dir, min_pixels=31_360, max_pixels=50_176)
    assert small.encode_prompt([_user(None)], [noise_image(30, 30)]).grid.prod() * 196 >= 31_360


def test_extreme_aspect_ratio_and_wrong_counts_are_record_errors(processor):
    with pytest.raises(RecordError, match=r"a:3: image of 2 x 401 pixels: aspect ratio above 200"):
        processor.encode_prompt([_user(None)], [noise_image(2, 401)], origin="a:3")
    assert processor.encode_prompt([_user(None)], [noise_image(2, 400)]).num_slots
    with pytest.raises(RecordError, match="2 image places in the messages, but 1 images"):
        processor.encode_prompt([_user(None, None)], [noise_image(56, 56)])
    with pytest.raises(RecordError, match="0 image places in the messages, but 1 images"):
        processor.encode_prompt([{"role": "user", "content": "x"}], [noise_image(56, 56)])


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>"]
)
def test_control_tokens_in_a_record_are_refused(processor, token):
    for message in ({"role": "user", "content": f"a{token}"}, _user(f"a{token}")):
        with pytest.raises(RecordError, match="control token"):
            processor.encode_prompt([message])


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>", "<tool_call>"])
def test_an_escaped_token_is_text_and_not_the_token(processor, token):
    special = processor.tokenizer.convert_tokens_to_ids(token)
    table = token_bytes(processor.tokenizer)

    def ids(text):
        return processor.encode_prompt([_user(text)]).token_ids

    plain = ids("say stop now")
    escaped = ids(f"say \\{token} now")
    assert (escaped == special).sum() == (plain == special).sum()
    assert f"say {token} now".encode() in b"".join(table[i] for i in escaped)
    # Two backslashes are a line break of LaTeX, and the token behind them is one.
    if token != "<tool_call>":
        with pytest.raises(RecordError, match=rf"control token .* write .{re.escape(token)} where"):
            ids(rf"x \\{token}")


def test_escaped_tokens_leave_images_and_the_loss_where_they_are(processor):
    said = r"<think>so \<|im_end|> ends</think><answer>1</answer>"
    turns = [_user(r"\<|image_pad|> or ", None, "?"), {"role": "assistant", "content": said}]
    encoded = processor.encode_conversation(turns, [noise_image(56, 56)], mask_first_attempt=True)
    assert _learned(processor, encoded) == "<think></think><answer></answer><|im_end|>"
    assert (encoded.token_ids == processor.image_token_id).sum() == encoded.vision.num_merged == 4
    whole = processor.encode_conversation(turns, [noise_image(56, 56)])
    assert _learned(processor, whole) == said.replace("\\", "") + "<|im_end|>"


def test_half_a_surrogate_pair_in_a_message_is_a_record_error(processor):
    for encode in (processor.encode_prompt, processor.encode_conversation):
        with pytest.raises(RecordError, match="f:3: half a surrogate pair in"):
            encode([_user("half \ud83d"), {"role": "assistant", "content": "x"}], origin="f:3")


@pytest.mark.parametrize(
    "message, reason",
    [
        ({"content": "x"}, "without a role"),
        ({"role": "user"}, "without content"),
        ({"role": "user", "content": ["x"]}, "neither text nor image"),
        ({"role": "user", "content": [{"type": "text"}]}, "neither text nor image"),
        ({"role": "user", "content": [{"type": "video"}]}, "neither text nor image"),
    ],
)
def test_malformed_messages_are_record_errors(processor, message, reason):
    with pytest.raises(RecordError, match=reason):
        processor.encode_prompt([message])


def test_conversation_ids_equal_hf_and_loss_covers_assistant_turns_only(any_dir):
    ours, theirs = Processor(any_dir, **PIXELS), hf_processor(any_dir, **PIXELS)
    images = [noise_image(100, 80), noise_image(60, 200)]
    messages = [
        _user(None, "One?"),
        {"role": "assistant", "content": "First\n\n answer. "},
        _user("Two ", None, "?"),
        {"role": "assistant", "content": "\nSecond é中 answer"},
    ]
    text = theirs.apply_chat_template(messages, tokenize=False)
    expected = theirs(text=[text], images=images, return_tensors="np")
    encoded = ours.encode_conversation(messages, images)
    assert encoded.token_ids.tolist() == np.asarray(expected["input_ids"])[0].tolist()
    learned = _learned(ours, encoded)
    # A target that begins with a line break may share a token with the header's own one.
    first, second = "First\n\n answer. <|im_end|>", "\nSecond é中 answer<|im_end|>"
    assert learned in (first + second, f"{first}\n{second}")
    # The header of a turn and the newline after its end are not learned.
    ends = np.flatnonzero(encoded.token_ids == ours.eos_ids[0])
    assert encoded.loss_mask[ends].tolist() == [0, 0, 1, 0, 1]  # system, user, assistant, ...
    assert (encoded.loss_mask[ends + 1] == 0).all()


def test_a_multi_part_assistant_turn_is_learned(processor):
    turn = {"role": "assistant", "content": [{"type": "text", "text": "the answer"}]}
    encoded = processor.encode_conversation([_user("Q"), turn])
    assert _learned(processor, encoded) == "the answer<|im_end|>"


def test_a_wrong_first_attempt_is_masked_but_its_tags_are_learned(processor):
    response = srpo_response("it is 3 + 4", "7", "wrong, multiply", "3 * 4", "12")
    messages = [*srpo_messages("3 rows of 4?", 1), {"role": "assistant", "content": response}]
    image = [noise_image(84, 84)]
    plain = processor.encode_conversation(messages, image)
    masked = processor.encode_conversation(messages, image, mask_first_attempt=True)
    assert (plain.token_ids == masked.token_ids).all()
    assert _learned(processor, plain) == response + "<|im_end|>"
    learned = _learned(processor, masked)
    for gone in ("it is 3 + 4", "$\\boxed{7}$"):
        assert gone in response and gone not in learned
    rest = response[response.index("<reflection>") :]
    assert learned.endswith(rest + "<|im_end|>")
    assert learned.startswith("<think") and "</think>" in learned[:30]
    # The example in the system prompt has the same tags: only the last turn is masked.
    assert plain.loss_mask.sum() > masked.loss_mask.sum() > len(rest) / 10


def test_masking_takes_the_last_assistant_turn_and_needs_blocks(processor):
    turn = {"role": "assistant", "content": "<think>aa</think><answer>bb</answer>"}
    plain = {"role": "assistant", "content": "no blocks"}
    encoded = processor.encode_conversation(
        [_user("q"), turn, _user("q"), turn], mask_first_attempt=True
    )
    assert _learned(processor, encoded).count("aa") == 1
    with pytest.raises(RecordError, match="no <think> block to mask"):
        processor.encode_conversation(
            [_user("q"), turn, _user("q"), plain], mask_first_attempt=True
        )
    with pytest.raises(RecordError, match="no assistant turn"):
        processor.encode_conversation([_user("q")])


def test_ids_come_from_the_files_of_the_model(hf_dir, tmp_path, processor):
    names = processor.tokenizer.convert_ids_to_tokens
    assert names(list(processor.eos_ids)) == ["<|im_end|>", "<|endoftext|>"]
    assert names(processor.pad_id) == "<|endoftext|>"
    assert names(list(processor.forbidden_ids)) == [
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    bad = make_hf_dir(tmp_path / "bad", image_token_id=5)
    with pytest.raises(ValueError, match=r"config.json: image_token_id=5, but <\|image_pad\|>"):
        Processor(bad)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="bare: no tokenizer.json or vocab.json; copy it"):
        Processor(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Processor(tmp_path / "nothing")
    with pytest.raises(ValueError, match="need 0 < min <= max"):
        Processor(hf_dir, min_pixels=10, max_pixels=5)
    (bad / "chat_template.json").unlink()
    (bad / "config.json").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Processor(bad)
    (bad / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert Processor(bad).geometry.window_size == 112
    (bad / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json: not valid JSON"):
        Processor(bad)


def test_real_files_give_the_published_ids(shared_data):
    processor = Processor(shared_data / "tokenizer_qwen2_5_vl")
    assert processor.eos_ids == (151645, 151643) and processor.pad_id == 151643
    assert processor.forbidden_ids == (151652, 151653, 151654, 151655, 151656)
    assert processor.vocab_size == 151665
    expected = shared_data / "tokenizer_qwen2_5_vl" / "tokenizer_expected_ids.json"
    cases = json.loads(expected.read_text())["cases"]
    assert len(cases) == 4
    for case in cases:
        assert processor.tokenizer.encode(case["text"]) == case["input_ids"]


def test_token_bytes_join_to_the_text(any_dir):
    processor = Processor(any_dir)
    table = token_bytes(processor.tokenizer, size=len(processor.tokenizer) + 7)
    assert len(table) == len(processor.tokenizer) + 7 and table[-7:] == [b""] * 7
    text = "<think>é 中文 🎉\r\n\t ~\x7f</think><tool_call><|im_end|>\x00"
    ids = processor.tokenizer.encode(text)
    assert b"".join(table[i] for i in ids) == text.encode()
    singles = {b for b in table if len(b) == 1}
    assert len(singles) == 256  # every byte has a token of its own


def test_token_bytes_refuses_other_tokenizers():
    class WordPiece:
        def get_added_vocab(self):
            return {}

        def get_vocab(self):
            return {"▁the": 0}

    with pytest.raises(ValueError, match="not a byte-level BPE"):
        token_bytes(WordPiece())


def test_processor_can_be_pickled_for_workers(processor):
    copy = pickle.loads(pickle.dumps(processor))
    image = [noise_image(90, 70)]
    one = processor.encode_prompt([_user(None, "q")], image)
    two = copy.encode_prompt([_user(None, "q")], image)
    assert (one.token_ids == two.token_ids).all() and (
        one.vision.patches == two.vision.patches
    ).all()


def test_hf_outputs_with_videos_can_be_encoded():
    ids = VisionIds(90, 91, tokens_per_second=2)
    image, video = np.ones((24, 1176), np.float32), np.full((48, 1176), 2.0, np.float32)
    tokens = [1, *[91] * 12, 2, *[90] * 6, 3]
    encoded = encode_arrays(
        tokens,
        ids,
        Media(
            pixel_values=image,
            image_grid_thw=[[1, 4, 6]],
            pixel_values_videos=video,
            video_grid_thw=[[3, 4, 4]],
            second_per_grid_ts=[0.5],
        ),
    )
    # Images stand before videos in the row, whatever the order in the text.
    assert encoded.vision_src.tolist() == [-1, *range(6, 18), -1, *range(6), -1]
    assert _raster(encoded)[:, 0].tolist() == [1] * 24 + [2] * 48
    assert encoded.mrope[0, 1:13].tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert encoded.loss_mask.tolist() == [0.0] + [1.0] * 20


# --- batches ---


def _text(processor, words, origin=""):
    return processor.encode_conversation(
        [_user("q"), {"role": "assistant", "content": words}], origin=origin
    )


def _picture(processor, width, height, origin="", seed=0):
    messages = [_user(None, "q"), {"role": "assistant", "content": "answer"}]
    return processor.encode_conversation(
        messages, [noise_image(width, height, seed)], origin=origin
    )


def test_collate_pads_and_keeps_indices_inside_the_row(processor):
    samples = [_picture(processor, 56, 84, seed=1), _picture(processor, 140, 56, seed=2)]
    samples.append(_text(processor, "only words"))
    batch = collate(samples, rows=2, tokens=80, patches=192, pad_id=7, per_row=2)
    assert batch.tokens.shape == (4, 80) and batch.vision.patches.shape == (2, 192, 1176)
    assert batch.valid.tolist() == [True, True, True, False]
    n = [s.num_tokens for s in samples]
    assert batch.lengths.tolist() == [*n, 1]
    assert batch.next_pos[:3].tolist() == [s.next_pos for s in samples]
    first = samples[0].vision.num_merged
    assert batch.vision_src[0].max() == first - 1
    assert batch.vision_src[1][batch.vision_src[1] >= 0].min() == first
    assert (batch.vision_src[2:] == -1).all()
    for b, sample in enumerate(samples):
        assert (batch.tokens[b, : n[b]] == sample.token_ids).all()
        assert (batch.tokens[b, n[b] :] == 7).all()
        assert (batch.segment_ids[b] == (np.arange(80) < n[b])).all()
        assert (batch.mrope[b, :, : n[b]] == sample.mrope).all()
        assert (batch.loss_mask[b, : n[b]] == sample.loss_mask).all()
    # The text's image token finds, through both indices, the pixels of its own image.
    for b, sample in enumerate(samples[:2]):
        src = batch.vision_src[b][batch.vision_src[b] >= 0]
        slots = batch.vision.merge_src[0][src]
        assert (batch.vision.patches[0].reshape(-1, 4, 1176)[slots].reshape(-1, 1176)
                == _raster(sample)).all()  # fmt: skip
    assert not batch.vision.window_valid[1].any()
    # A filler sees one token, so that no softmax is empty.
    assert batch.segment_ids[3].tolist() == [1] + [0] * 79 and not batch.loss_mask[3].any()


def test_collate_without_patches_has_no_vision(processor):
    batch = collate([_text(processor, "words")], rows=1, tokens=64)
    assert batch.vision is None and batch.tokens.shape == (1, 64)


def test_budgets_name_the_record(processor):
    sample = _picture(processor, 140, 140, origin="d.jsonl:7")
    with pytest.raises(RecordError, match=r"d.jsonl:7: \d+ tokens exceed the budget of 20"):
        collate([sample], rows=1, tokens=20, patches=256)
    with pytest.raises(RecordError, match=r"d.jsonl:7: \d+ image patches in its row exceed"):
        collate([sample, sample], rows=1, tokens=200, patches=256)
    with pytest.raises(ValueError, match="3 samples for 1 rows of 2 sequences"):
        collate([sample] * 3, rows=1, tokens=200, patches=256, per_row=2)


def test_packing_restarts_positions_and_numbers_the_samples(processor):
    samples = [_picture(processor, 56, 56, seed=s) for s in range(3)]
    samples.insert(1, _text(processor, "the words"))
    n = [s.num_tokens for s in samples]
    batch = collate_packed([samples[:3], samples[3:]], rows=1, tokens=sum(n[:3]) + 2, patches=192)
    assert batch.segment_ids[0].tolist() == [1] * n[0] + [2] * n[1] + [3] * n[2] + [0] * 2
    start = n[0] + n[1]
    assert (batch.mrope[0, :, start : start + n[2]] == samples[2].mrope).all()
    assert (batch.loss_mask[0, start : start + n[2]] == samples[2].loss_mask).all()
    assert batch.vision_src[0][batch.vision_src[0] >= 0].tolist() == list(range(8))
    assert batch.vision_src[1][batch.vision_src[1] >= 0].tolist() == list(range(8, 12))
    starts = np.cumsum([0, *n[:3]])[:-1]
    assert not batch.loss_mask[0][starts].any()  # nothing predicts a sample's first token
    assert batch.lengths.tolist() == [sum(n[:3]), n[3]]


def test_first_fit_obeys_tokens_and_patches(processor):
    small, large = _picture(processor, 56, 56), _picture(processor, 140, 140)
    assert (small.num_slots, large.num_slots) == (64, 256)
    room = max(small.num_tokens, large.num_tokens)
    fit = FirstFit(rows=2, per_row=1, tokens=room, patches=256)
    # small fills row 0's tokens; the large one needs all patches of row 1; the rest must wait.
    assert [fit.place(one) for one in (small, large, large, small)] == [0, 1, -1, -1]
    fit = FirstFit(rows=1, per_row=2, tokens=room, patches=256)
    assert [fit.place(one) for one in (large, small)] == [0, -1]
    fit = FirstFit(rows=1, per_row=2, tokens=room, patches=320)
    assert [fit.place(one) for one in (large, small)] == [0, 1]


def test_real_problems_encode(shared_data):
    from srpo_jax.data.encoders import PromptEncoder
    from srpo_jax.data.records import open_records

    source = open_records(shared_data / "geometry3k_formalgeo_1500" / "data.jsonl")
    encoder = PromptEncoder(Processor(shared_data / "tokenizer_qwen2_5_vl"))
    assert len(source) == 1500
    for index in range(0, 1500, 75):
        encoded = encoder(source[index])
        assert 4 <= encoded.vision.num_merged <= 640
        assert encoded.mrope.max() + 1 == encoded.next_pos <= encoded.num_tokens


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_images_of_other_modes_give_hf_pixels(hf_dir, processor, mode):
    image = noise_image(60, 60).convert(mode)
    theirs = hf_processor(hf_dir, **PIXELS).image_processor
    if mode == "RGBA":
        image.putalpha(128)
        opaque = theirs([image.convert("RGB")], return_tensors="np")["pixel_values"]
        if (theirs([image], return_tensors="np")["pixel_values"] == opaque).all():
            pytest.skip("this transformers drops transparency; ours follows 5.23")
    encoded = processor.encode_prompt([_user(None)], [image])
    expected = theirs([image], return_tensors="np")
    assert (_raster(encoded) == expected["pixel_values"]).all()


def test_files_as_transformers_5_saves_them_are_read(hf_dir, tmp_path, processor):
    theirs = hf_processor(hf_dir)
    theirs.tokenizer.save_pretrained(tmp_path)
    theirs.image_processor.save_pretrained(tmp_path)
    saved = tmp_path / "preprocessor_config.json"
    nested = {"image_processor": json.loads(saved.read_text())}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    (tmp_path / "chat_template.jinja").write_text(theirs.chat_template)
    saved.unlink()
    one = Processor(tmp_path, **PIXELS).encode_prompt([_user(None, "q")], [noise_image(300, 200)])
    two = processor.encode_prompt([_user(None, "q")], [noise_image(300, 200)])
    assert (one.token_ids == two.token_ids).all() and (
        one.vision.patches == two.vision.patches
    ).all()
