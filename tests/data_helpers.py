"""Small stand-ins that the data tests share: an HF directory, HF's own processor, images, records.

The tokenizer is a byte-level BPE with a few merges and Qwen's special tokens, so that most tests
need neither a download nor ../shared/data.
"""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if loop.first and m.role != 'system' -%}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif -%}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.content is string -%}{{ m.content }}{%- else -%}"
    "{%- for part in m.content -%}"
    "{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
CORPUS = [
    "What is the sum of the dots in the picture? Think, answer and reflect.",
    "<think>the the</think><answer>12</answer><reflection>again</reflection>",
    "You are a helpful assistant. user system assistant",
] * 3


def make_hf_dir(folder: Path, **config) -> Path:
    """Write tokenizer, template, processor and config files of a small model into ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {t: tokenizer.token_to_id(t) for t in SPECIAL}

    def write(name: str, content: dict) -> None:
        (folder / name).write_text(json.dumps(content))

    write("chat_template.json", {"chat_template": CHAT_TEMPLATE})
    write(
        "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"},
    )
    write(
        "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )
    write(
        "generation_config.json",
        {
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )
    write(
        "config.json",
        {
            "model_type": "qwen2_5_vl",
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_config": {"window_size": 112, "tokens_per_second": 2},
            **config,
        },
    )
    return folder


def hf_processor(hf_dir: Path, **pixels):
    """HF's own Qwen2_5_VLProcessor, without torchvision and video support."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    class _Processor(Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, name, argument):
            return type(argument)

    class _NoVideo:
        model_input_names: list[str] = []

    return _Processor(
        Qwen2VLImageProcessorPil.from_pretrained(hf_dir, **pixels),
        AutoTokenizer.from_pretrained(hf_dir),
        _NoVideo(),
        chat_template=json.loads((hf_dir / "chat_template.json").read_text())["chat_template"],
    )


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image in which every pixel differs."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def png(image: Image.Image, **options) -> bytes:
    """The image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_dots(folder: Path, count: int, sizes=((56, 56), (84, 56), (140, 112))) -> Path:
    """``count`` good records with images of several sizes beside them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        name = f"images/{i}.png"
        noise_image(*sizes[i % len(sizes)], seed=i).save(folder / name)
        rows.append({"id": f"r{i}", "problem": f"sum {i}?", "answer": str(i), "images": [name]})
    return write_jsonl(folder / "data.jsonl", rows)
