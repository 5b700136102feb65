r"""SRPO stage 2: GRPO with the reflection reward.

    python -m srpo_jax.train_grpo --config=configs/grpo.py:size=7b --workdir=runs/rl \
        --config.hf_dir=Qwen2.5-VL-7B-Instruct --config.init_from=runs/sft \
        --config.data.train=rl.jsonl --config.eval.file=held_out.jsonl

Arguments: size = 3b, 7b, 32b, 72b, tiny; mode = full, debug; recipe = paper, authors, best. The
defaults are the paper's recipe (sources in comments as in common.py): 500 steps of 128 prompts x 8
samples. With recipe=authors a value of the authors' code stands where the paper has another
(AUTHORS); recipe=best follows our study (docs/study.md), in which nothing beat the paper's so far.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common

# What the authors' OpenRLHF scripts and reward file do otherwise than the paper says.
AUTHORS = {
    "steps": 876,  # num_episodes 3 of 37,390 prompts (their evaluation reads step 550)
    "reward.profile": "openrlhf",  # pays most for a wrong first answer made right; no I_ref
    "filter.on": "composite",
    "filter.resample": True,
    "filter.max_age": 0,  # surplus groups are thrown away
    "grpo.adv_eps": 1e-9,
}

# What each does otherwise than the paper. "best" nothing: no arm of the study has an established
# gain over the paper's reward, on either task.
RECIPES: dict[str, dict[str, Any]] = {"paper": {}, "authors": AUTHORS, "best": {}}


def arguments() -> dict[str, tuple[str, ...]]:
    """What may stand behind the colon of --config; the first of each is the default."""
    sizes, recipes = ("7b", *common.SIZES), tuple(RECIPES)
    return {"size": sizes, "mode": common.MODES, "recipe": recipes}


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for ``arg``, e.g. "size=7b,mode=debug"."""
    args = common.parse_arg(arg, **arguments())
    config = common.base(args.size)
    common.add_images(config, max_pixels=640 * 28 * 28)  # 501,760 (R: train_ppo_ray.py)
    common.add_training(config)
    common.add_evaluation(config, periodic=True)
    common.add_grading(config)

    config.steps = 500  # rollouts; P table 9 ("3 epochs" of P 4.1 would be 876)

    config.data = data = ConfigDict()
    data.train = ""  # records: .jsonl, .parquet, .array_record, tfds
    data.mix = ()  # weights of several, as in data.train=a.jsonl,b.jsonl; (): by their sizes
    data.root = ""  # folder that images must lie in; empty: the file's
    common.add_columns(data)
    # "plain": one round of think and answer (GRPO control). "adaptive": the policy may end after
    # its first answer, or write all five blocks; format is right in both cases.
    data.prompt = "srpo"
    data.global_batch_size = 128  # prompts of a step (P 4.1)
    data.prompts_per_row = common.SIZES[args.size].prompts_per_row  # at most: memory of a row
    # Budget: 426 for the template, up to 640 for an image, the rest for the question
    # (R: prompt_max_len 1024, with a shorter template).
    data.prompt_tokens = 1664
    # Patch slots of a row; a batch takes the smallest that fits. An image takes up to 2,560
    # patches (max_pixels / 14**2) plus the padding of its windows. They shrink with prompts_per_row
    # where many devices leave a row fewer prompts.
    data.patch_budgets = tuple(data.prompts_per_row * n for n in (1024, 2048, 3584))
    data.shuffle = True  # anew in each pass
    data.workers = common.data_workers(args.size)  # processes that read and encode; 0: threads
    # Seconds that one record is waited for: then once more, of new workers; 0: for ever.
    data.timeout = 600.0
    data.max_bad_share = 0.01  # more bad records than this, beyond chance, stop the run

    sampling = common.add_sampling(config)
    sampling.group_size = 8  # samples of a prompt, G (P 4.1)
    sampling.temperature = 1.0  # of training samples (P 4.1)
    sampling.forks = 1  # M: the group is G / M first rounds, each continued M times
    sampling.engine = outside_engine()

    config.reward = reward = ConfigDict()
    reward.profile = "paper"  # or "openrlhf", "verl_fixed", "grpo", "balanced"
    reward.alpha = 0.1  # weight of the length term (P 3.2, table 6)
    # Weight of a right first answer, beside the profile's terms; 0: none. With credit "segments" it
    # pays the first round.
    reward.first = 0.0
    reward.verdict = 0.0  # weight of +-1 for what a reflection says of the first answer; 0: none
    common.add_words(reward)
    reward.overlong = 0.0  # weight of DAPO's penalty on length; 0: none
    reward.overlong_buffer = 0  # tokens before sampling.max_new_tokens where it sets in
    # Reward per token of a response whose final answer is right, taken off: with "adaptive" the
    # policy learns when a reflection is worth its tokens (profile "grpo"; docs/objectives.md).
    reward.token_price = 0.0
    own_rewards(reward)

    config.filter = groups = ConfigDict()
    # Groups whose mean correctness lies outside [low, high] get weight 0 (P 4.1): that of the
    # "final" answer, the "first", "either" (one lies inside), or R's "composite" of both.
    groups.on = "final"
    groups.low = 0.1  # lower end of the band (P 4.1)
    groups.high = 0.9  # upper end (P 4.1)
    groups.resample = False  # True: sample on until the batch is full of groups inside (R)
    groups.max_rounds = 4  # of sampling in one step
    groups.max_age = 1  # steps that a group sampled beyond the batch may wait; 0: none waits

    config.grpo = update = objective()

    config.optim = optim = ConfigDict()
    optim.kind = "adamw"  # or "adafactor" (a fraction of the memory), "muon"
    optim.lr = 1e-6  # highest learning rate (P 4.1)
    optim.schedule = "cosine"  # or "constant"
    optim.warmup_ratio = 0.03  # share of the steps (R)
    optim.final_fraction = 0.1  # R: cosine with a floor of a tenth
    optim.b1 = 0.9  # decay of the first moment (R)
    optim.b2 = 0.95  # of the second one (R)
    optim.eps = 1e-8  # added to the root of the second moment
    optim.weight_decay = 0.0  # of matrices (R)
    optim.grad_clip = 1.0  # norm of the gradient, at most (R)
    # Of the first moment; or "bfloat16". "int8": both moments, in blocks (docs/memory.md).
    optim.moment_dtype = "float32"
    optim.offload = False  # True: optimizer state and reference wait in host memory (GPU, TPU)
    optim.max_skipped = 5  # updates in a row that are not finite, which end the run
    config.freeze = ("vision/",)  # tower and merger (P 4.1; R: freeze_prefix visual)

    config.preflight = True  # look at answers, reward and sampler before it costs hours

    config.rollouts = rollouts = ConfigDict()
    rollouts.every = 1  # steps between files of completions; 0: none
    # True: those of a step are sampled before the update of the step before, during which they are
    # graded; the policy is then one update step older than the one that learns from them.
    rollouts.late = False

    config.update_from_flattened_dict(RECIPES[args.recipe])
    if args.mode == "debug":
        common.shrink(config)
        sampling.group_size = 2
        update.updates_per_rollout = 1
        groups.low, groups.high = 0.0, 1.0
    return config


def own_rewards(reward: ConfigDict) -> None:
    """Terms of your own beside the profile's or in their place (docs/rewards.md)."""
    reward.function = ""  # in a file, as my_reward.py:score; "": none
    reward.weight = "1"  # of its terms: a number, or NAME=0.5,OTHER=1
    reward.replace = False  # True: the profile's terms are left out
    reward.timeout = 60.0  # seconds that one call of the function may take
    reward.workers = 2  # processes that call it

    # A language model that scores responses by a rubric (docs/rewards.md).
    reward.judge = judge = ConfigDict()
    judge.model = ""  # its name; "": none
    judge.url = ""  # of an OpenAI-compatible server; "": OPENAI_BASE_URL, or the vendor's own
    judge.rubric = ""  # text, or a file of it
    judge.weight = 1.0  # of its score in the reward
    judge.max_calls = 0  # of a whole run, to be set with a model; then groups get weight 0
    judge.concurrency = 16  # requests in flight, of each process
    judge.temperature = 0.0  # below 0: none is sent, for models that take none
    judge.key_env = "OPENAI_API_KEY"  # NAME of the variable that holds the key; "": none is sent


def outside_engine() -> ConfigDict:
    """A server that draws the training samples in the sampler's place (docs/engine.md)."""
    engine = ConfigDict()
    engine.url = ""  # of an inference engine, as http://host:8000/v1; "": the own sampler
    engine.kind = "vllm"  # or "sglang"
    # Where weights are written for it, a folder that it sees under the same path; "": engine/ in
    # the workdir.
    engine.folder = ""
    engine.sync_every = 1  # steps between two times that it is given the weights
    engine.timeout = 600.0  # seconds without an answer until the run saves and ends
    engine.concurrency = 64  # requests (prompts) in flight, of each process
    engine.key_env = ""  # NAME of the variable that holds its key; "": none is sent
    return engine


def objective() -> ConfigDict:
    """What is minimised, and in how many updates (docs/objectives.md)."""
    update = ConfigDict()
    update.updates_per_rollout = 8  # R: 1024 samples in updates of 128
    update.adv_eps = 1e-6  # added to the group's std (R has 1e-9)
    update.epochs = 1  # passes over a rollout
    update.advantage = "group"  # P equation 3; or "centred", "rloo", "batch_std"
    update.normalise_terms = False  # each reward term by itself before they are added up (GDPO)
    # "segments": the first round is paid by its own terms, what comes after by the others against
    # samples whose first answer was as right.
    update.credit = "whole"
    update.objective = "clip"  # P equation 2; or "gspo", "cispo", "sapo"
    update.sapo_positive = 1.0  # temperature of "sapo" where the advantage is positive
    update.sapo_negative = 1.05  # that of "sapo" where it is negative
    update.clip_low = 0.2  # R: eps_clip, symmetric
    update.clip_high = 0.2  # R: the same
    update.dual_clip = 3.0  # R caps the ratio at 3
    update.kl_coef = 0.0  # R: init_kl_coef 0; P has a coefficient but no number
    update.kl_kind = "k3"  # P B.3; or "k1", "k2", "k3+" (its value, the gradient of k2)
    update.kl_in_reward = False  # True: taken off each sample's reward instead
    update.kl_target = 0.0  # nats a token that kl_coef is adapted to; 0: it stays
    update.ref_every = 0  # steps after which the policy becomes the reference; 0: never
    update.entropy_coef = 0.0  # weight of an entropy bonus; 0: none
    update.perception_coef = 0.0  # of the KL to the policy with masked images, raised; 0: off
    update.perception_mask = 0.6  # share of the patches that are masked
    update.masked_entropy_coef = 0.0  # as entropy_coef, of the policy with masked images
    update.aggregation = "sequence"  # mean over tokens, then over sequences (R)
    update.mask_truncated = False  # True: samples that the budget cut off have no loss
    update.tis_cap = 0.0  # cap of the weight against the sampler's probabilities; 0: off
    update.tis_floor = 0.0  # above 0: weights outside [floor, cap] become 0 (IcePop)
    update.tis_level = "token"  # or "sequence": one weight for a sample
    update.logit_chunk = 1024  # tokens of a row whose logits exist at a time
    return update
