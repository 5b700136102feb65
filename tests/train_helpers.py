"""A Hugging Face directory of a tiny model and small data files, for tests that train for real."""

import dataclasses
import json
import sys
import typing
from pathlib import Path

import jax
import numpy as np
from jax._src import cache_key
from ml_collections import ConfigDict
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configs import eval as eval_config
from configs import grpo, sft
from srpo_jax.model.sizes import Shape
from srpo_jax.rewards.profiles import Profile
from srpo_jax.run.resume import flat_config
from srpo_jax.sampling.forks import Automaton
from srpo_jax.structs import Verdict
from tools.demo.tokenizer import SPECIAL_TOKENS, write_tokenizer
from tools.make_hf import TOKEN_KEYS, make_config, write_random_hf

VOCAB = 320
TEXTS = ["user assistant\nHow many dots are in picture", "<think>I guess There are </think>"]


def make_hf_dir(folder: Path, seed: int = 0) -> Path:
    """Random weights (width 16, 2 layers), a small tokenizer without system turns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    ids = write_tokenizer(tokenizer, folder / "tokenizer")
    shape = Shape(
        hidden=16,
        layers=2,
        heads=2,
        kv_heads=2,
        mlp=32,
        vocab_size=VOCAB,
        vision_hidden=16,
        vision_depth=2,
        vision_heads=2,
        vision_mlp=32,
        full_blocks=(1,),
        tied=False,
    )
    config = make_config(
        shape, {key: ids[token] for key, token in TOKEN_KEYS.items() if token in ids}
    )
    out = folder / "hf"
    write_random_hf(out, config, folder / "tokenizer", seed=seed, dtype="float32", std=0.1)
    return out


def write_records(path: Path, count: int, seed: int = 0) -> Path:
    """``count`` problems with a 56 x 56 picture each, and the fields of reflection data."""
    rng = np.random.default_rng(seed)
    images = path.parent / f"{path.stem}_images"
    images.mkdir(parents=True)
    with open(path, "w") as file:
        for i in range(count):
            name = f"{i}.png"
            Image.fromarray(rng.integers(0, 255, (56, 56, 3), np.uint8)).save(images / name)
            answer = str(rng.integers(0, 9))
            record = {
                "id": f"{path.stem}-{i}",
                "problem": f"How many dots are in picture {i}?",
                "answer": answer,
                "images": [f"{images.name}/{name}"],
                "first_think": "I guess 4.",
                "first_answer": "4",
                "reflection": "Count again.",
                "second_think": f"There are {answer}.",
                "second_answer": answer,
                "first_correct": answer == "4",
            }
            file.write(json.dumps(record) + "\n")
    return path


def world(folder: Path) -> dict[str, str]:
    """An HF directory, 40 training and 6 held-out records under ``folder``; their paths."""
    return {
        "hf_dir": str(make_hf_dir(folder)),
        "train": str(write_records(folder / "train.jsonl", 40)),
        "held_out": str(write_records(folder / "held_out.jsonl", 6, seed=1)),
    }


def compile_once() -> None:
    """Of several processes on CPUs the first one compiles for all, and keeps what it compiled."""
    # The fingerprint of a CPU's topology is another one in each process.
    vars(cache_key)["_hash_accelerator_config"] = cache_key._hash_devices
    jax.config.update("jax_share_binary_between_hosts", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class Reads:
    """Which keys of a config its settings are read for, while ``patch`` is in force.

    Copies, comparisons and checks of a dataclass read all of its fields and mean nothing by it.
    """

    NOT_READING = ("__post_init__", "_value", "<lambda>", "replace", "_replace", "__eq__")

    def __init__(self, patch, settings: type):
        self._seen: set[str] = set()
        self._watch(patch, settings, "")

    def _watch(self, patch, kind: type, prefix: str) -> None:
        hints = typing.get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        original = kind.__getattribute__

        def noting(one, name):
            if name in names and sys._getframe(1).f_code.co_name not in self.NOT_READING:
                self._seen.add(prefix + name)
            return original(one, name)

        patch.setattr(kind, "__getattribute__", noting)
        for name in names:
            if dataclasses.is_dataclass(hints[name]) and hints[name] is not Profile:
                self._watch(patch, hints[name], f"{prefix}{name}.")

    def unread(self, config: ConfigDict) -> set[str]:
        """Dotted names of the config's keys that nobody has read."""
        return set(flat_config(config.to_dict())) - self._seen


def _small(config, paths):
    config.hf_dir = paths["hf_dir"]
    config.max_pixels = 56 * 56
    config.data.patch_budgets = (64,)
    config.data.prompt_tokens = 64
    config.eval.batch_size = 4
    config.eval.limit = 0
    return config


def sft_config(paths: dict[str, str], steps: int = 2, **mesh):
    """configs/sft.py:size=tiny,mode=debug on the small data."""
    config = _small(sft.get_config("size=tiny,mode=debug"), paths)
    config.data.train = paths["train"]
    config.data.tokens, config.data.patch_budgets = 288, (128,)  # two conversations
    config.steps = steps
    config.mesh.update(mesh)
    return config


def grpo_config(paths: dict[str, str], steps: int = 2, **mesh):
    """configs/grpo.py:size=tiny,mode=debug on the small data."""
    config = _small(grpo.get_config("size=tiny,mode=debug"), paths)
    config.data.train = paths["train"]
    config.steps = steps
    config.mesh.update(mesh)
    return config


def evaluation_config(paths: dict[str, str], **mesh):
    """configs/eval.py:size=tiny,mode=debug on the held-out records."""
    config = _small(eval_config.get_config("size=tiny,mode=debug"), paths)
    config.eval.file = paths["held_out"]
    config.mesh.update(mesh)
    return config


def write_answers(monkeypatch):
    """A random model writes no tags: every fourth token is an answer, for forks to part behind."""
    make = Automaton.of_tokens
    pieces = [b"<answer>7</answer>" if i % 4 == 0 else b"x" for i in range(VOCAB)]
    monkeypatch.setattr(Automaton, "of_tokens", lambda text, size: make(text and pieces, size))


def fake_grade(completions_PGR, completion_mask_PGR, *_, **__):
    """Verdicts that depend on the sampled tokens: random weights earn no real reward."""
    ids = np.where(completion_mask_PGR, completions_PGR, 0).astype(np.int64)
    number = (ids * np.arange(1, ids.shape[-1] + 1)).sum(-1)
    bits = [(number >> k) % 2 == 1 for k in range(6)]
    length = completion_mask_PGR.sum(-1).astype(np.int32)
    verdict = Verdict(
        first_correct=bits[0],
        final_correct=bits[1],
        has_first=np.ones_like(bits[0]),
        has_second=np.ones_like(bits[0]),
        format_ok=bits[2],
        reflection_ok=bits[3],
        reflection_new=bits[4],
        stated=np.where(bits[5], 1, -1).astype(np.int32),
        first_tokens=np.maximum(length // 2, 1),
        first_end=np.maximum(length // 2, 1),
        total_tokens=length,
        block_tokens=np.zeros((*length.shape, 5), np.int32),
    )
    empty = dict.fromkeys(("first_think", "first_answer", "reflection"))
    spans = empty | dict.fromkeys(("second_think", "second_answer"))
    detail = {"graded": True, "spans": spans, "blocks": spans}
    detail |= {"first_answer": None, "final_answer": None}
    texts = [" ".join(map(str, row)) for row in ids.reshape(-1, ids.shape[-1]).tolist()]
    return verdict, [{"text": text, **detail} for text in texts]
