r"""Evaluation of a Hugging Face directory or a checkpoint on a file of problems.

    python -m srpo_jax.evaluate --config=configs/eval.py:size=7b --workdir=runs/eval \
        --config.hf_dir=Qwen2.5-VL-7B-Instruct --config.init_from=runs/rl \
        --config.eval.file=test.jsonl --config.eval.samples=8 --config.eval.temperature=1.0

Arguments: size = 3b, 7b, 32b, 72b, tiny; mode = full, debug. The default is greedy decoding.
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
    common.add_images(config, max_pixels=640 * 28 * 28)  # 501,760, as in RL
    held_out = common.add_evaluation(config, periodic=False)
    # Whose accuracy and tokens are the headline: of the whole response, or of one that ends after
    # its first answer, always or where that is confident. All three are in the summary.
    held_out.stop_after = "final"
    sampling = common.add_sampling(config)
    sampling.max_new_tokens = 4096  # R: its evaluation scripts
    common.add_grading(config)

    config.reward = reward = ConfigDict()
    reward.profile = "paper"  # whose format rules hold
    common.add_words(reward)
    config.bootstrap = 1000  # resamples for the 95 % intervals

    config.data = data = ConfigDict()
    data.root = ""  # folder that images must lie in; empty: the file's
    common.add_columns(data)
    data.prompt = "srpo"  # or "plain", "adaptive"
    data.prompt_tokens = 1664  # budget, images included, as in RL
    data.prompts_per_row = 4  # prompts whose images one data shard encodes at a time
    # Patch slots of a row; a batch takes the smallest that fits.
    data.patch_budgets = tuple(data.prompts_per_row * n for n in (1024, 2048, 3584))
    data.workers = common.data_workers(args.size)  # processes that read and encode; 0: threads
    # Seconds that one record is waited for: then once more, of new workers; 0: for ever.
    data.timeout = 600.0
    data.max_bad_share = 0.01  # more bad records than this, beyond chance, are refused at the start

    if args.mode == "debug":
        common.shrink(config)
    return config
