"""What the configurations share: arguments after the colon, and the sections of every run.

Sources named in the comments: P = paper (arXiv 2506.01713 v3), R = the authors' repository (the
OpenRLHF scripts for RL, the LLaMA-Factory yaml for SFT); the rest is a choice of this project.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from srpo_jax.data.fields import Columns
from srpo_jax.model.sizes import SIZES  # tiny: any small model, in float32

MODES = ("full", "debug")  # debug: two steps of a few samples, to see that everything is in place


def parse_arg(arg: str | None, **known: Any) -> SimpleNamespace:
    """``"size=7b,mode=debug"`` -> the values of ``known``, replaced where the argument says so.

    A tuple in ``known`` lists the allowed values, its first one is the default; any other value is
    the default and gives the type. Raises ValueError for an unknown argument or a wrong value.
    """
    values = {name: v[0] if isinstance(v, tuple) else v for name, v in known.items()}
    for part in filter(None, (arg or "").split(",")):
        name, equals, text = part.partition("=")
        if not equals or name not in known:
            raise ValueError(
                f"config argument {part!r}: known are {', '.join(f'{n}=' for n in known)} as in "
                "configs/grpo.py:size=7b,mode=debug"
            )
        default = known[name]
        if isinstance(default, tuple):
            if text not in default:
                allowed = ", ".join(dict.fromkeys(default))
                raise ValueError(f"config argument {part!r}: {name} is one of {allowed}")
            values[name] = text
        elif isinstance(default, bool):
            if text not in ("True", "False"):
                raise ValueError(f"config argument {part!r}: {name} is True or False")
            values[name] = text == "True"
        else:
            try:
                values[name] = type(default)(text)
            except ValueError:
                kind = type(default).__name__
                raise ValueError(f"config argument {part!r}: {name} takes {kind}") from None
    return SimpleNamespace(**values)


def base(size: str) -> ConfigDict:
    """The sections that training and evaluation share."""
    config = ConfigDict()
    config.size = size  # of the model, as in the argument
    config.seed = 0  # of data order, samples and adapters

    # A Hugging Face directory: config, tokenizer and image processor; weights too where init_from
    # is empty.
    config.hf_dir = ""
    # Where weights come from: a parameter checkpoint, a step, a run's --workdir, or a PEFT adapter
    # of hf_dir.
    config.init_from = ""

    config.model = model = ConfigDict()
    model.dtype = "float32" if size == "tiny" else "bfloat16"  # matrix products (R: bf16)
    model.param_dtype = "float32"  # master weights
    # What the backward pass computes again: "block", all; "dots": more memory, less work;
    # "offload": less memory, on a GPU or TPU.
    model.remat = "none" if size == "tiny" else "block"
    model.attention = "auto"  # the fastest that the device has

    config.mesh = mesh = ConfigDict()
    mesh.data = 1  # across slices and nodes that share no fast interconnect
    mesh.fsdp = -1  # all devices that are left
    mesh.tensor = SIZES[size].tensor_parallel  # devices that share a layer

    config.distributed = distributed = ConfigDict()
    distributed.enabled = False  # True: several processes
    distributed.coordinator = ""  # host:port; empty: found on TPU pods, under SLURM, Kubernetes
    distributed.num_processes = 0  # 0: found
    distributed.process_id = -1  # which one this is; -1: found
    # Seconds without a sign of life of a process until the others end, naming it; 0: jax's own way.
    distributed.timeout = 120.0

    config.compilation_cache_dir = ""  # where compiled programs are kept for later runs
    config.compile_guard = True  # a recompilation after warm-up stops the run
    config.compiler_defaults = True  # of docs/compiler_flags.md, where the environment is silent

    config.log = log = ConfigDict()
    log.console = "auto"  # a live table on a terminal, else a line a step; or "plain", "json"
    return config


def add_images(config: ConfigDict, max_pixels: int) -> None:
    """Pixel limits of an image; both are handed to Hugging Face's image processor."""
    config.min_pixels = 4 * 28 * 28  # 3,136 (R: train_ppo_ray.py)
    config.max_pixels = max_pixels  # of an image (R)


def add_training(config: ConfigDict) -> None:
    """Adapters, checkpoints, logs and export of both training stages."""
    config.export_hf_dir = ""  # a Hugging Face directory to write at the end

    config.lora = lora = ConfigDict()  # docs/lora.md
    lora.rank = 0  # of adapters, which are trained in the place of the weights; 0: none
    lora.alpha = 32.0  # they are scaled by alpha / rank
    # Layers with an adapter, * for anything: all seven of each decoder layer. "vision/*" is the
    # tower and its merger, which must not be frozen then.
    lora.targets = ("text/layers/*",)
    lora.base_dtype = ""  # as model.param_dtype; or "int8": the decoder's layers, with scales
    lora.export = "merged"  # weights with the adapters in them; or "adapter": a PEFT directory

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 50  # steps; also at the end, and on SIGTERM
    checkpoint.keep = 2  # newest; the best evaluated one is kept besides
    checkpoint.keep_every = 500  # and every multiple of this (R: every 500 steps); 0: none
    checkpoint.fallback = False  # where the newest is damaged, go on from the newest whole one
    # From SIGTERM to SIGKILL, as the scheduler has it (Kubernetes: 30). Half of it may go into
    # finishing the step, the other half is left for the checkpoint.
    checkpoint.grace_seconds = 25.0
    # Steps between two looks at whether all devices that hold the same parameters and optimizer
    # state hold the same bits; 0: none. A difference is faulty hardware, and ends the run.
    checkpoint.verify_replicas_every = 0
    # Keys or sections that a resumed run may change: "optim.lr,data"; "True": any. More steps or
    # epochs are always allowed.
    checkpoint.allow_changes = ""

    log: Any = config.log
    log.every = 1  # steps between rows of metrics.jsonl
    log.keep = 10  # steps between lines that stay above the live table; 0: none
    log.tensorboard = True  # events of the same numbers in tensorboard/
    log.wandb_project = ""  # empty: no W&B
    log.mlflow_experiment = ""  # empty: no MLflow; MLFLOW_TRACKING_URI says where it is


def add_evaluation(config: ConfigDict, *, periodic: bool) -> ConfigDict:
    """Evaluation on a held-out file; returns the section."""
    config.eval = held_out = ConfigDict()
    held_out.file = ""  # records; in training, empty means no evaluation
    held_out.benchmark = ""  # the file is this benchmark in its published form
    held_out.scoring = "official_rule"  # of a benchmark; or "strict": this project's grader
    held_out.any_count = False  # allow another number of problems than the published one
    if periodic:
        held_out.every = 50  # steps between evaluations
        held_out.at_start = False  # True: before the first step too
    held_out.limit = 0  # first so many records; 0: all
    held_out.batch_size = 128  # prompts at a time
    held_out.temperature = 0.0  # greedy
    held_out.samples = 1  # for each prompt
    return held_out


def add_sampling(config: ConfigDict) -> ConfigDict:
    """How completions are drawn, in training and evaluation alike; returns the section."""
    config.sampling = sampling = ConfigDict()
    sampling.max_new_tokens = 2048  # budget of an answer (R: generate_max_len)
    sampling.top_k = 0  # most likely tokens to draw from; 0: all
    sampling.top_p = 1.0  # probability mass to draw from; 1: all (R)
    sampling.min_p = 0.0  # of the most likely token's probability, at least; 0: off
    sampling.segment = 64  # tokens between two looks at what is done
    sampling.concurrent_rows = 0  # rows of a shard in the cache at a time; 0: all
    return sampling


def add_words(reward: ConfigDict) -> None:
    """Words with which a reflection states its verdict on the first answer."""
    # With which a reflection says that the first answer is right.
    reward.right_words = ("correct", "accurate", "yes", "ok")
    # And that it is wrong.
    reward.wrong_words = ("incorrect", "inaccurate", "wrong", "mistaken", "mistake", "error")


def add_grading(config: ConfigDict) -> None:
    """Worker processes that compare answers."""
    config.grading = grading = ConfigDict()
    grading.workers = 2 if config.size == "tiny" else 8  # most checks take less than 20 ms
    grading.timeout = 5.0  # seconds of processor time a check may take, twice, before it is wrong
    grading.step_timeout = 300.0  # seconds for all checks of a batch; later ones get no verdict
    grading.tolerance = 0.0  # relative, of numbers; a record's own tolerance or decimals go first


def add_columns(data: ConfigDict) -> None:
    """Foreign names of a record's columns, as in ``--config.data.columns.image=img``; "": its own.

    Images and choices may be spread over several: ``images=image_1,image_2``.
    """
    data.columns = ConfigDict({column.name: "" for column in dataclasses.fields(Columns)})


def data_workers(size: str) -> int:
    """Processes that read and encode records; 0: threads, which small images do not outgrow."""
    return 0 if size == "tiny" else 4


def shrink(config: ConfigDict) -> None:
    """mode=debug: two steps, an evaluation and a checkpoint, in as little time as possible.

    Images are shrunk to a tenth of a megapixel, so that short budgets hold prompts and images of
    any recipe; with one patch budget each program is compiled once.
    """
    small = {
        "max_pixels": 128 * 28 * 28,
        "eval.limit": 8,
        "eval.batch_size": 8,
        "grading.workers": 1,
        "sampling.max_new_tokens": 16,
        "sampling.segment": 8,
        "data.workers": 0,
        "data.prompts_per_row": 1,
        "data.prompt_tokens": 1024,
        "data.patch_budgets": (2048,),
    }
    if "steps" in config:
        small |= {
            "steps": 2,
            "checkpoint.every": 2,
            "checkpoint.keep_every": 0,
            "log.tensorboard": False,
            "eval.every": 2,
            "data.global_batch_size": 8,
        }
    config.update_from_flattened_dict(small)
