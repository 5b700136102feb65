"""Configs: every size and mode instantiates, arguments are checked, the recipe's values stand."""

import dataclasses
import io
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from train_helpers import Reads

from configs import common, grpo, sft
from configs import eval as evaluation
from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.fields import Record
from srpo_jax.data.images import ImageRef
from srpo_jax.data.processing import Processor
from srpo_jax.data.vision_arrays import VisionGeometry
from srpo_jax.learn.optim import OptimConfig, make_optimizer
from srpo_jax.model.sizes import SIZES, size_config
from srpo_jax.run.budgets import check_images, largest_image, prompt_budgets
from srpo_jax.run.command import one_word_each
from srpo_jax.run.preflight import truncation_note
from srpo_jax.run.recipe import check_arguments
from srpo_jax.run.resume import check_config, flat_config
from srpo_jax.run.sections import GrpoSettings
from srpo_jax.run.settings import (
    batch_layout,
    evaluate_settings,
    fit_rows,
    grpo_config,
    grpo_settings,
    sft_config,
    sft_settings,
)
from srpo_jax.structs import RunError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"sft": sft, "grpo": grpo, "eval": evaluation}
SETTINGS = {"sft": sft_settings, "grpo": grpo_settings, "eval": evaluate_settings}


@pytest.mark.parametrize("mode", common.MODES)
@pytest.mark.parametrize("size", common.SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_size_and_mode_gives_valid_settings(name, size, mode):
    config = CONFIGS[name].get_config(f"size={size},mode={mode}")
    assert config.size == size
    settings = SETTINGS[name](config)  # raises for a key or a value that it does not know
    if size != "tiny":
        model = size_config(size, **dataclasses.asdict(settings.model))
        assert model.text.num_attention_heads % settings.mesh.tensor == 0
    if name != "eval":
        make_optimizer(settings.optim, 100)
    if name == "grpo":
        grpo_config(settings, 1, forbidden_ids=())
    # One image of the largest size, with every window padded, fits into some patch budget.
    _, slots = largest_image(config.max_pixels, VisionGeometry())
    assert max(config.data.patch_budgets) >= slots
    assert all(budget % 64 == 0 for budget in config.data.patch_budgets)
    if mode == "debug" and name != "eval":
        assert config.steps == 2 and config.data.global_batch_size <= 8


@pytest.mark.parametrize("size", [size for size in common.SIZES if size != "tiny"])
def test_a_recipe_fits_its_rows_to_any_number_of_data_shards(size):
    for shards in (1, 2, 3, 8, 12, 16, 24, 32, 64, 128, 512):
        rl = fit_rows(grpo_settings(grpo.get_config(f"size={size}")), shards, 64)
        cfg, layout = grpo_config(rl, shards, forbidden_ids=()), batch_layout(rl, shards)
        assert cfg.updates_per_rollout == 8 and (layout.places() >= 0).sum() == 128
        assert layout.per_row == rl.data.prompts_per_row <= SIZES[size].prompts_per_row
        assert layout.size < 2 * 128 or shards > 128  # fillers are fewer than prompts
        # A row of one prompt takes its small images without room for two, and the largest anyway.
        assert rl.data.patch_budgets[:3] == tuple(layout.per_row * n for n in (1024, 2048, 3584))
        assert max(rl.data.patch_budgets) == 3584 * SIZES[size].prompts_per_row
        sft_config(fit_rows(sft_settings(sft.get_config(f"size={size}")), shards, 64), shards)
    config = grpo.get_config(f"size={size}")
    config.grpo.updates_per_rollout = 48
    with pytest.raises(RunError, match="^grpo.updates_per_rollout=48 must divide .*rollout=32$"):
        grpo_config(grpo_settings(config), 8, forbidden_ids=())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_of_the_recipes_holds_an_image_at_the_pixel_cap_and_a_question(name, shared_data):
    settings = SETTINGS[name](CONFIGS[name].get_config("size=7b"))
    limits = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    processor = Processor(shared_data / "tokenizer_qwen2_5_vl", **limits)
    encode, budgets = PromptEncoder(processor), prompt_budgets(settings)
    told = check_images(processor, encode, budgets)
    assert int(re.search(r"(\d+) left for the question$", told)[1]) >= 512
    room, slots = largest_image(settings.max_pixels, processor.geometry)
    for size in ((1000, 700), (800, 800), (1024, 768), (1280, 720), (768, 1536)):
        file = io.BytesIO()
        Image.new("RGB", size).save(file, "PNG")
        image = ImageRef("r:1", data=file.getvalue())
        encoded = encode(Record("r", "word " * 500, "1", images=(image,), origin="r:1"))
        assert budgets.fault(encoded, "r:1") is None
        assert encoded.vision.num_merged <= room and encoded.num_slots <= slots
    for key, small in (("data.prompt_tokens", {"tokens": 700}), ("data.patch", {"patches": 64})):
        with pytest.raises(RunError, match=f"^{key}.* not hold one image of max_pixels="):
            check_images(processor, encode, dataclasses.replace(budgets, **small))


@pytest.mark.parametrize("name", CONFIGS)
def test_debug_mode_has_short_budgets_and_one_shape_for_each_program(name):
    config = CONFIGS[name].get_config("size=7b,mode=debug")
    assert config.max_pixels <= 2**17 and len(config.data.patch_budgets) == 1
    assert config.data.prompt_tokens <= 1024 and config.data.get("tokens", 0) <= 2048
    assert config.sampling.max_new_tokens <= 16 and config.eval.limit <= 8


def test_the_default_is_the_full_7b_recipe():
    config = grpo.get_config()
    assert config == grpo.get_config("size=7b,mode=full")
    assert (config.data.global_batch_size, config.sampling.group_size) == (128, 8)
    assert (config.data.prompt_tokens, config.sampling.max_new_tokens) == (1664, 2048)
    assert (config.sampling.temperature, config.sampling.top_p) == (1.0, 1.0)
    assert (config.min_pixels, config.max_pixels) == (3136, 501_760)
    assert grpo_settings(config).optim == OptimConfig(
        lr=1e-6, warmup_ratio=0.03, final_fraction=0.1, b1=0.9, b2=0.95, weight_decay=0.0,
        grad_clip=1.0,
    )  # fmt: skip
    assert (config.filter.low, config.filter.high) == (0.1, 0.9)
    assert config.grpo.kl_coef == 0.0 and config.freeze == ("vision/",)
    stage1 = sft.get_config()
    assert (stage1.optim.lr, stage1.optim.warmup_ratio, stage1.epochs) == (1e-5, 0.1, 1)
    assert stage1.data.global_batch_size == 16 and stage1.data.tokens == 4096


def test_the_authors_recipe_is_the_papers_but_for_what_their_code_does_otherwise():
    paper, authors = (grpo.get_config(f"size=7b,recipe={name}") for name in ("paper", "authors"))
    assert paper == grpo.get_config()
    old, new = (flat_config(config.to_dict()) for config in (paper, authors))
    assert {key: new[key] for key in new if old[key] != new[key]} == grpo.AUTHORS
    settings = grpo_settings(authors)
    assert settings.reward.profile.name == "openrlhf" and settings.filter.on == "composite"
    debug = grpo_settings(grpo.get_config("size=7b,mode=debug,recipe=authors"))
    assert debug.steps == 2 and debug.filter.low == 0.0


def test_the_best_recipe_is_the_papers_as_long_as_the_study_finds_none_better():
    assert grpo.get_config("size=7b,recipe=best") == grpo.get_config("size=7b")
    assert set(grpo.arguments()["recipe"]) == {"paper", "authors", "best"}


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("colour=red", "'colour=red': known are size=, mode="),
        ("7b", "'7b': known are size=, mode="),
        ("size=8b", "size is one of 7b, 3b, 32b, 72b, tiny"),
        ("size=7b,mode=fast", "mode is one of full, debug"),
    ],
)
def test_unknown_arguments_are_refused_with_what_is_known(arg, message):
    for module in CONFIGS.values():
        with pytest.raises(ValueError, match=message):
            module.get_config(arg)


def test_arguments_are_typed_by_their_defaults():
    known = {"n": 3, "x": 0.5, "on": False, "name": ("a", "b")}
    config = common.parse_arg("n=4,x=1e-3,on=True,name=b", **known)
    assert (config.n, config.x, config.on, config.name) == (4, 1e-3, True, "b")
    assert common.parse_arg("", **known).name == "a"
    for wrong in ("n=half", "x=many", "on=yes", "name=c"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            common.parse_arg(wrong, **known)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.optm.lr=1"], "--config.optm.lr: .* did you mean --config.optim.lr"),
        (["--config.optim.learning_rate=1"], "no such key; optim has b1, b2, eps, .* lr,"),
        (["--config.seed=1", "--config.seed=2"], "--config.seed: given 2 times"),
        (["--config=configs/sft.py:size=8b"], "size is one of 7b, 3b, 32b, 72b, tiny"),
        (["--config=configs/nope.py"], "configs/nope.py is no file; give one of configs/"),
        (["--config=README.md"], "README.md is no Python file"),
        (["--config.steps=1.5"], "--config.steps=1.5: takes a whole number, as 0"),
        (["--config.optim.lr=much"], "--config.optim.lr=much: takes a number, as 1e-05"),
        (["--config.data.pack=maybe"], "--config.data.pack=maybe: takes True or False"),
        (["--steps=3"], "--steps: is a key of the configuration; write --config.steps=3"),
        (["--config.data=x"], "--config.data: is a section; change its keys"),
    ],
)
def test_what_is_misspelt_on_the_command_line_is_one_line_with_what_was_meant(words, message):
    config = [] if words[0].startswith("--config=") else ["--config=configs/sft.py:size=3b"]
    with pytest.raises((ValueError, RunError), match=message):
        check_arguments([*config, "--workdir=nowhere", *words])


def test_flags_may_stand_beside_their_values_but_no_word_alone():
    words = ["-config", "configs/sft.py", "--debug", "--config.seed", "-1", "--workdir=w"]
    joined = ["--config=configs/sft.py", "--debug", "--config.seed=-1", "--workdir=w"]
    assert one_word_each(words) == joined
    for stray in (["stray"], ["--debug", "3"], ["--config.steps=3", "4"], ["--config.steps", "="]):
        with pytest.raises(RunError, match=f"'{stray[-1]}' belongs to no flag"):
            one_word_each(stray)


def test_a_wrong_command_line_ends_with_one_line_and_code_1():
    command = [sys.executable, "-m", "srpo_jax.train_sft", "--config=configs/sft.py:size=3b"]
    for words, told in (
        (["--config.optim.learning_rate=1"], "optim has b1, b2"),
        ([], "--workdir is missing; give it as in --workdir=runs/NAME"),
        (["--workdir=README.md"], "--workdir=README.md: is a file; give a folder"),
    ):
        done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and told in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_help_shows_an_example_and_a_wrong_setting_is_one_line():
    command = [sys.executable, "-m", "srpo_jax.train_grpo"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "--config=configs/grpo.py:size=7b --workdir=runs/rl" in shown
    assert "traceback of an error" in shown
    done = subprocess.run(
        [*command, "--config=configs/grpo.py:size=7b", "--workdir=/nowhere"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: hf_dir is empty")


def test_keys_that_nobody_reads_are_found(monkeypatch):
    config = grpo.get_config()
    reads = Reads(monkeypatch, GrpoSettings)
    settings = grpo_settings(config)
    _ = settings.hf_dir, dataclasses.asdict(settings.mesh), settings.grpo.clip_low
    _ = dataclasses.replace(settings.sampling, top_k=1)
    assert not {"hf_dir", "mesh.fsdp", "grpo.clip_low"} & reads.unread(config)
    assert {"seed", "distributed.enabled", "sampling.top_p"} <= reads.unread(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.lr": -1.0}, "^optim.lr=-1.0: must not be negative"),
        ({"steps": 0}, "^steps=0: must be at least 1"),
        ({"steps": -5}, "^steps=-5: must not be negative"),
        ({"data.global_batch_size": 0}, "^data.global_batch_size=0: must be at least 1"),
        ({"optim.lr": math.inf}, "^optim.lr=inf: must not be negative or infinite"),
        ({"seed": -1}, "^seed=-1: must be at least 0 and below"),
        ({"grpo.adv_eps": -1.0}, "^grpo.adv_eps=-1.0: must not be negative"),
        ({"grpo.entropy_coef": math.nan}, "^grpo.entropy_coef=nan: must be a number"),
        ({"model.param_dtype": "float16"}, "^model.param_dtype=float16: choose one of float32, b"),
        ({"optim.grad_clip": 0.0}, "^optim.grad_clip=0.0: must be above 0"),
        ({"optim.b2": 1.0}, "^optim.b2=1.0: must be at least 0 and below 1"),
        (
            {"optim.moment_dtype": "float16"},
            "^optim.moment_dtype=float16: choose one of float32, b",
        ),
        (
            {"optim.kind": "adafactor", "optim.moment_dtype": "int8"},
            "^optim.moment_dtype=int8: adafactor has no moments .*float32$",
        ),
        ({"lora.base_dtype": "int8"}, "^lora.base_dtype=int8: .* set --config.lora.rank, or leave"),
        ({"optim.max_skipped": 0}, "^optim.max_skipped=0: must be at least 1"),
        ({"grpo.clip_high": 0.0}, "^grpo.clip_high=0.0: must be above 0"),
        ({"grpo.dual_clip": 0.5}, "^grpo.dual_clip=0.5: must be above 1, or 0"),
        (
            {"rollouts.late": True, "filter.resample": True},
            "^rollouts.late=True and filter.resample=True: .*set one of them$",
        ),
        ({"grpo.perception_coef": -1.0}, "^grpo.perception_coef=-1.0: must not be negative"),
        ({"grpo.perception_mask": 1.5}, "^grpo.perception_mask=1.5: must lie between 0 and 1"),
        (
            {"grpo.masked_entropy_coef": 0.1},
            "^grpo.masked_entropy_coef=0.1: no image is masked; set perception_coef above 0",
        ),
        ({"grpo.ref_every": 9}, "^grpo.ref_every=9: there is no KL; set kl_coef above 0"),
        ({"grpo.kl_target": 0.1}, "^grpo.kl_target=0.1: there is no KL; set kl_coef above 0"),
        ({"filter.max_age": -1}, "^filter.max_age=-1: must not be negative"),
        (
            {"reward.token_price": 0.1, "sampling.max_new_tokens": 36},
            "^reward.token_price=0.1 takes 3.6 off a right answer of .*: set it below 0.028$",
        ),
        ({"filter.low": 0.9, "filter.high": 0.1}, "^filter.low=0.9 and filter.high=0.1: no group"),
        (
            {"filter.low": 0.9, "filter.high": 0.95},
            "no number of right samples of .*=8 has a share",
        ),
        ({"filter.on": "last"}, "^filter.on=last: choose one of final, first, either, composite"),
        ({"filter.high": 1.5}, "^filter.high=1.5: must lie between 0 and 1"),
        ({"data.patch_budgets": (1024, "a")}, r"^data.patch_budgets=\(1024, 'a'\): must be whole"),
        ({"freeze": ("vision/", 3)}, "^freeze=.*: must be texts"),
        ({"model.dtype": "bf16"}, "^model.dtype=bf16: choose one of float32, bfloat16"),
        ({"data.prompt": "spro"}, "^data.prompt=spro: choose one of srpo, plain"),
        ({"reward.profile": "papr"}, "^reward.profile: .*'papr'.* paper, openrlhf"),
        ({"optim.schedule": "linear"}, "^optim.schedule=linear: choose one of cosine, constant"),
        ({"sampling.top_p": 0.0}, r"^sampling.top_p: must be in \(0, 1\]"),
        ({"min_pixels": 10**6}, "^min_pixels=1000000 lies above max_pixels=501760"),
        ({"data.mix": (1.0, 0.0)}, r"^data.mix=\(1.0, 0.0\): weights must be above 0"),
        ({"data.columns.image": "a", "data.columns.images": "b"}, "^data.columns.images and image"),
        ({"eval.samples": 4}, "^eval.samples=4 greedy samples are all the same"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_by_key(changes, message):
    config = grpo.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(RunError, match=message):
        grpo_settings(config)


def test_stage_1_needs_steps_or_epochs():
    config = sft.get_config()
    config.epochs = 0
    with pytest.raises(RunError, match="^steps=0 and epochs=0: set one of them"):
        sft_settings(config)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"sampling.top_p": 0.9, "sampling.top_k": 50}, "sampling.top_k=50, sampling.top_p=0.9"),
        ({"sampling.min_p": 0.1}, "sampling.min_p=0.1"),
        ({"sampling.top_p": 0.9, "grpo.tis_cap": 2.0}, None),
    ],
)
def test_truncated_sampling_without_weights_is_said_to_be_biased(changes, told):
    config = grpo.get_config()
    config.update_from_flattened_dict(changes)
    note = truncation_note(grpo_settings(config))
    assert note is None if told is None else note.startswith(f"note: {told} draws")


def test_another_programs_config_is_refused_by_key():
    with pytest.raises(RunError, match="^epochs: no such key; is this the program's own config"):
        grpo_settings(sft.get_config())
    config = grpo.get_config()
    del config.data.prompt
    with pytest.raises(RunError, match="^data.prompt: is missing"):
        grpo_settings(config)


def test_of_buckets_only_those_that_can_be_reached_are_taken():
    config = sft.get_config("size=tiny")
    assert str(sft_settings(config, "gs://bucket/run").workdir) == "gs://bucket/run"
    with pytest.raises(RunError, match="of buckets only gs:// is supported"):
        sft_settings(config, "s3://bucket/run")
    config.hf_dir, config.data.train = "gs://bucket/hf", "gs://bucket/a.jsonl,gs://bucket/b.jsonl"
    sft_settings(config)
    config.data.train = "gs://bucket/a.jsonl,s3://bucket/b.jsonl"
    with pytest.raises(RunError, match="data.train=gs://.*: of buckets only gs:// is supported"):
        sft_settings(config)


def test_a_run_goes_on_with_other_files_of_rollouts_but_not_with_rollouts_of_another_age():
    plain = grpo.get_config().to_dict()
    seldom = grpo.get_config()
    seldom.rollouts.every = 10
    check_config(plain, seldom.to_dict())
    late = grpo.get_config()
    late.rollouts.late = True
    with pytest.raises(RunError, match="rollouts.late"):
        check_config(plain, late.to_dict())
