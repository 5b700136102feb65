r"""SRPO stage 1: supervised fine-tuning on reflection data.

    python -m srpo_jax.train_sft --config=configs/sft.py:size=7b --workdir=runs/sft \
        --config.hf_dir=Qwen2.5-VL-7B-Instruct --config.data.train=reflections.jsonl

Arguments: size = 3b, 7b, 32b, 72b, tiny; mode = full, debug. Sources in comments as in common.py:
the paper gives neither learning rate nor batch size for this stage, the repository's yaml does.
"""

from ml_collections import ConfigDict

from configs import common


def arguments() -> dict[str, tuple[str, ...]]:
    """What may stand behind the colon of --config; the first of each is the default."""
    return {"size": ("7b", *common.SIZES), "mode": common.MODES}


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for ``arg``, e.g. "size=7b,mode=debug"."""
    args = common.parse_arg(arg, **arguments())
    config = common.base(args.size)
    common.add_images(config, max_pixels=262_144)  # R: image_max_pixels
    common.add_training(config)
    common.add_evaluation(config, periodic=True)
    common.add_grading(config)

    config.epochs = 1  # passes over the data: P 4.1 and table 9 (R: 3)
    config.steps = 0  # updates; 0: as many as the epochs hold

    config.data = data = ConfigDict()
    data.train = ""  # records with reflections: .jsonl, .parquet, .array_record, tfds
    data.mix = ()  # weights of several, as in data.train=a.jsonl,b.jsonl; (): by their sizes
    data.root = ""  # folder that images must lie in; empty: the file's
    common.add_columns(data)
    # "rl_aligned": five blocks, as RL wants them; "paper": the paper's one think and two answers;
    # "plain": one round; "gold": the gold answer in five blocks, where nobody wrote reasoning;
    # "adaptive": five blocks, or a first round that is right where a record has no more.
    data.target = "rl_aligned"
    # No loss on a wrong first attempt: "true", "false", or "auto": so for rl_aligned, while paper
    # imitates all (P, R).
    data.mask_wrong_first = "auto"
    data.global_batch_size = 16  # R: 8 GPUs x 1 x accumulation 2
    data.prompts_per_row = common.SIZES[args.size].sequences_per_row  # at most
    data.tokens = 4096  # budget of a conversation (R: cutoff_len)
    # Conversations of a batch one behind the other in its sequences. An update learns from the same
    # ones, packed or not; its cost follows their tokens, not the budget.
    data.pack = True
    data.prompt_tokens = 1280  # budget of a prompt in the evaluation: images are smaller than in RL
    # The largest is what packed conversations with images of max_pixels have in a row, about.
    data.patch_budgets = tuple(data.prompts_per_row * n for n in (1024, 2048, 4608))
    data.shuffle = True  # anew in each pass
    data.workers = common.data_workers(args.size)  # processes that read and encode; 0: threads
    # Seconds that one record is waited for: then once more, of new workers; 0: for ever.
    data.timeout = 600.0
    data.max_bad_share = 0.01  # more bad records than this, beyond chance, stop the run

    common.add_sampling(config)  # of the evaluation

    config.logit_chunk = 256  # positions whose logits exist at a time

    config.optim = optim = ConfigDict()
    optim.kind = "adamw"  # or "adafactor" (a fraction of the memory), "muon"
    optim.lr = 1e-5  # highest learning rate (R)
    optim.schedule = "cosine"  # or "constant"
    optim.warmup_ratio = 0.1  # share of the steps (R)
    optim.final_fraction = 0.0  # R: cosine to zero
    optim.b1 = 0.9  # decay of the first moment (R: its framework's default)
    optim.b2 = 0.999  # of the second moment
    optim.eps = 1e-8  # added to the root of the second moment
    optim.weight_decay = 0.0  # of matrices
    optim.grad_clip = 1.0  # norm of the gradient, at most
    # Of the first moment; or "bfloat16". "int8": both moments, in blocks (docs/memory.md).
    optim.moment_dtype = "float32"
    optim.offload = False  # True: its state waits in host memory (GPU, TPU)
    optim.max_skipped = 5  # updates in a row that are not finite, which end the run
    config.freeze = ("vision/",)  # R: freeze_vision_tower, freeze_multi_modal_projector

    if args.mode == "debug":
        common.shrink(config)
        data.tokens = 2048
    return config
