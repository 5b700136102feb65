"""An estimate of a step's time by phase: what its programs compute and move, over stated rates.

Shapes are those of a run: assumed lengths are packed by `learn.lanes` and sampled by
`sampling.schedule`. What the host does (loading, grading) is not counted.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from srpo_jax.data.packing import TOO_MANY, Packer, Placed, RowShape, cheapest, placed_in
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.lanes import LaneBudgets, pack, slots_and_tokens
from srpo_jax.learn.optim import make_optimizer, trains_vision
from srpo_jax.learn.state import abstract_state
from srpo_jax.learn.steps import SftConfig
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.sampling.sampler import Sampler, SamplingConfig
from srpo_jax.structs import Lanes
from tools.lib.assumed import Lengths, Sampled, sample
from tools.lib.planned import Recipe
from tools.lib.roofline import TRAIN, TRAIN_OTHERS, Cost, Passes, Phase, Piece, Rates

# Part of a prompt's (or a conversation's) tokens that are its image's.
IMAGE_SHARE = 1 / 3
# Means of lengths, as parts of their budgets, where none are given: completions of 870 tokens of
# 2,048, which is what the paper's recipe samples; prompts of 600 of 1,664: the template takes 426.
MEANS = {"completions": 870 / 2048, "prompts": 600 / 1664}
SIGMAS = {"completions": 0.5, "prompts": 0.25}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Phases of a step, the tokens of all its sequences, and what to say about both."""

    phases: list[Phase]
    tokens: float  # a prompt counts with each of its samples, as in EasyR1's throughput
    written: float  # those of them that are sampled, or learned from
    note: str


def default_lengths(of: str, budget: int) -> Lengths:
    """Of "completions" or "prompts"."""
    return Lengths(round(MEANS[of] * budget, 1), SIGMAS[of])


def estimate(recipe: Recipe, lengths: Lengths | None, prompts: Lengths | None) -> Estimate:
    """One step of the recipe. ``lengths`` are those of completions, of SFT's conversations."""
    if isinstance(recipe.step, SftConfig):
        return _sft(recipe, recipe.step, lengths)
    assert recipe.sampling and recipe.budgets, "a GRPO recipe says how it samples and packs"
    return _grpo(recipe, recipe.step, recipe.sampling, recipe.budgets, (lengths, prompts))


def _grpo(
    recipe: Recipe,
    step: GrpoConfig,
    sampling: SamplingConfig,
    budgets: LaneBudgets,
    assumed: tuple[Lengths | None, Lengths | None],
) -> Estimate:
    cost, rng, layout = _cost(recipe), np.random.default_rng(0), budgets.layout
    budget = (sampling.max_new_tokens, recipe.shapes.tokens)
    defaults = map(default_lengths, ("completions", "prompts"), budget)
    own, of_prompts = (given or mine for given, mine in zip(assumed, defaults, strict=True))
    update_P = layout.places()
    prompts_P = of_prompts.draw(rng, update_P.shape, budget[1]) * (update_P >= 0)
    lengths_PG = own.draw(rng, (len(update_P), sampling.group_size), budget[0])
    lengths_PG *= (update_P >= 0)[:, None]

    schedule = Sampler(recipe.model, sampling, recipe.mesh).schedule(
        len(update_P), recipe.shapes.rows
    )
    sampled = sample(schedule, lengths_PG.reshape(schedule.shards, -1))
    cached = (schedule.C, sampling.group_size, budget[1])
    packed = list(itertools.chain(*pack(prompts_P, lengths_PG, budgets, update_P=update_P)))
    together = dataclasses.replace(layout, updates=1, sharing=1)
    together = dataclasses.replace(budgets, layout=together)
    before = [(update_P > 0) | (step.epochs > 1) & (update_P >= 0)] if step.updates > 1 else []
    before += [update_P >= 0] if step.needs_reference else []
    logps = [pack(prompts_P, lengths_PG * some[:, None], together)[0] for some in before]

    of_layers = cost.flops.text(prompts_P)
    rest = cost.flops.text(lengths_PG, prompts_P[:, None], head_tokens=lengths_PG.sum())
    passes = sum(some.sum() for some in before) / max((update_P >= 0).sum(), 1)
    # A pass over masked images, where the objective compares with it, costs as much as the other.
    views = 1 + bool(step.perception_coef)
    lanes = lambda held, passes: tuple(_of_lanes(cost, step, x, passes) for x in held if x)  # noqa: E731
    phases = [
        _encode(recipe, cost, prompts_P, views),
        _relayout(recipe, cost),
        Phase("prefill", of_layers, (_times(sampled.prefills, cost.prefill(budget[1])),)),
        Phase("decode_segment", rest, _decode(cost, sampled, cached)),
        Phase("move", 0.0, _moves(cost, sampled, budget[0])),
        Phase("logp_step", passes * (of_layers + rest), lanes(itertools.chain(*logps), Passes())),
        Phase(
            "accumulate",
            recipe.model.train_passes * step.epochs * views * (of_layers + rest),
            lanes(packed * step.epochs * views, _training(recipe)),
        ),
        Phase("apply", 0.0, (_times(step.updates, _apply(recipe)),)),
    ]
    slots, tokens = slots_and_tokens(packed)
    valid = update_P >= 0
    note = (
        f"{valid.sum()} prompts of {of_prompts} tokens (mean {prompts_P[valid].mean():.0f} of "
        f"{budget[1]}, a third of them the image's) x {sampling.group_size} samples of {own} "
        f"(mean {lengths_PG[valid].mean():.0f} of {budget[0]}), all with a weight\n"
        f"idle slots in decoding {schedule.idle_share:.1%}, padding in the update "
        f"{1 - tokens / slots:.1%}"
    )
    read = float((prompts_P * sampling.group_size + lengths_PG.sum(1)).sum())
    return Estimate(phases, read, float(lengths_PG.sum()), note)


def _sft(recipe: Recipe, step: SftConfig, lengths: Lengths | None) -> Estimate:
    """Conversations of which half of the text is the assistant's."""
    cost, shapes = _cost(recipe), recipe.shapes
    lengths = lengths or default_lengths("completions", shapes.tokens)
    drawn_B = lengths.draw(np.random.default_rng(0), (shapes.sequences,), shapes.tokens)
    learned = (1 - IMAGE_SHARE) / 2
    placed = _placed(recipe, step, drawn_B)
    shards, row = shapes.rows // step.micro_batches, placed.shape
    each = shards * row.places
    # The head's chunks end where the fullest sequence of a micro-batch does.
    taken_MAC = np.array([drawn_B[group].sum() for group in placed.groups])
    taken_MAC = taken_MAC.reshape(shards, step.micro_batches, row.places)
    longest = taken_MAC.max((0, 2))[: placed.rows].mean() * learned
    args = (each * row.tokens, each * row.tokens**2, each * longest)
    whole = cost.text(*args, passes=_training(recipe))
    useful = cost.flops.text(drawn_B, head_tokens=learned * drawn_B.sum())
    useful *= recipe.model.train_passes
    encode = _encode(recipe, cost, drawn_B)
    per_call = [_times(1 / placed.rows, piece) for piece in (*encode.pieces, _apply(recipe))]
    fields = ("flops", "memory", "links", "network", "sums", "summed")
    summed = [sum(p.calls * getattr(p, f) for p in (whole, *per_call)) for f in fields]
    phase = Phase("sft_step", useful + encode.useful, (Piece(placed.rows, *summed),))
    note = (
        f"{shapes.sequences} conversations of {lengths} tokens (mean {drawn_B.mean():.0f} of "
        f"{shapes.tokens}), a third of them the image's and half of the rest learned; padding "
        f"{1 - drawn_B.sum() / (placed.rows * each * row.tokens):.1%}"
    )
    return Estimate([phase], float(drawn_B.sum()), learned * float(drawn_B.sum()), note)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """As much of a conversation as packing looks at."""

    num_tokens: int
    num_slots: int


def _placed(recipe: Recipe, step: SftConfig, drawn_B: np.ndarray) -> Placed:
    """Conversations in rows, as the loader of one process places them."""
    shapes, unit = recipe.shapes, recipe.model.vision.window_slots
    whole = RowShape(shapes.sequences // shapes.rows, shapes.tokens)
    patches_B = np.ceil(drawn_B * IMAGE_SHARE * recipe.model.vision.merge_unit / unit) * unit
    patches_B = np.minimum(patches_B, shapes.patches // whole.places)  # as max_pixels sees to it
    drawn = [_Drawn(int(n), int(k)) for n, k in zip(drawn_B, patches_B, strict=True)]
    if step.packed:
        packer = Packer(shapes.rows // step.micro_batches, step.micro_batches, shapes.patches)
        ways = [*packer.ways(drawn, whole)]
        return cheapest(ways, [TOO_MANY if way is None else way.rows for way in ways])[1]
    groups = [[b] for b in range(len(drawn))]
    return placed_in(whole, groups, drawn, step.micro_batches)


def _training(recipe: Recipe) -> Passes:
    passes = TRAIN.get(recipe.model.remat, TRAIN_OTHERS)
    if recipe.model.lora:  # no gradients of weights and head; what adapters compute is left out
        names = ("products", "head", "collected")
        less = {name: getattr(passes, name) - 1 for name in names}
        passes = dataclasses.replace(passes, **less)
    return passes


def _cost(recipe: Recipe) -> Cost:
    state = abstract_state(recipe.model, make_optimizer(recipe.optimizer, 1), freeze=recipe.freeze)
    return Cost.of(recipe.model, recipe.mesh, sum(x.size for x in state.params.values()))


def _times(calls: float, piece: Piece) -> Piece:
    return dataclasses.replace(piece, calls=calls)


def _encode(recipe: Recipe, cost: Cost, lengths_B: np.ndarray, views: int = 1) -> Phase:
    """The tower, at the largest patch budget, of each view of the images; with its backward pass
    where it is trained."""
    vision, shapes = recipe.model.vision, recipe.shapes
    patches_B = lengths_B * IMAGE_SHARE * vision.merge_unit
    window = vision.window_slots
    useful = cost.flops.vision(
        float(patches_B.sum()), float(patches_B.sum() * window), float((patches_B**2).sum())
    )
    trained = trains_vision(abstract_params(recipe.model), recipe.freeze)
    once = cost.vision(shapes.rows, shapes.patches, window)
    again = [cost.vision(shapes.rows, shapes.patches, window, 4)] if trained else []
    passes = views * (recipe.model.train_passes if trained else 1)
    return Phase("encode", useful * passes, (once, *again) * views)


def _relayout(recipe: Recipe, cost: Cost) -> Phase:
    """Parameters collected for sampling: read where they lie, exchanged, written whole."""
    whole = (cost.layers + cost.head) / cost.tensor
    return Phase("relayout", 0.0, (cost.exchanged(Piece(1, 0.0, 3 * whole), whole),))


def _decode(cost: Cost, sampled: Sampled, cached: tuple[int, int, int]) -> tuple[Piece, ...]:
    """A call is here a token of every slot."""
    steps = sampled.steps.items()
    return tuple(_times(count, cost.decode(*sizes, cached)) for sizes, count in steps)


def _moves(cost: Cost, sampled: Sampled, columns: int) -> tuple[Piece, ...]:
    """Rings are read and written where slots are moved together."""
    moved = sampled.moves.items()
    return tuple(
        Piece(count, 0.0, (before + after) * columns * cost.cache_bytes)
        for (before, after), count in moved
    )


def _of_lanes(cost: Cost, step: GrpoConfig, lanes: Lanes[np.ndarray], passes: Passes) -> Piece:
    """A micro-batch: every slot of its blocks, every pair that a block's mask has, visible or not,
    and the chunks of the head up to the last row's last token."""
    (X, U), (_, C, T), M = lanes.prompt.shape, lanes.sample.shape, len(lanes.row)
    own = C * T
    pairs = X * (U**2 + own * (U + T))
    wanted = (lanes.sample >= 0).reshape(M, -1).sum(1).max()
    chunks = -(-X * own // M // step.logit_chunk)
    chunk = -(-X * own // M // chunks)
    return cost.text(X * (U + own), pairs, M * chunk * -(-wanted // chunk), passes)


def _apply(recipe: Recipe) -> Piece:
    """The optimizer: parameters and its state read and written, float32 gradients read."""
    state = abstract_state(recipe.model, make_optimizer(recipe.optimizer, 1), freeze=recipe.freeze)
    parts = recipe.mesh.shape["fsdp"] * recipe.mesh.shape["tensor"]
    leaves = jax.tree.leaves((state.params, state.opt_state))
    held = sum(2 * x.size * x.dtype.itemsize for x in leaves)
    held += sum(4 * x.size for x in state.params.values())
    return Piece(1, 0.0, held / parts)


# --- what is printed ---------------------------------------------------------------------------


def with_links(found: Estimate, exchanged: Mapping[str, float]) -> Estimate:
    """``exchanged``: program -> bytes that a call exchanges, of those that were compiled."""

    def add(phase: Phase) -> Phase:
        if phase.name not in exchanged:
            return phase
        pieces = tuple(_as_compiled(p, exchanged[phase.name]) for p in phase.pieces)
        return dataclasses.replace(phase, pieces=pieces)

    return dataclasses.replace(found, phases=[add(phase) for phase in found.phases])


def _as_compiled(piece: Piece, exchanged: float) -> Piece:
    """A compiled program does not say what is summed over tensor or crosses slices: these stay as
    they were counted."""
    rest = max(exchanged - piece.network - piece.summed, 0.0)
    return dataclasses.replace(piece, links=rest)


def cost(seconds: float, devices: int, price_per_hour: float, steps: int = 1000) -> float:
    """Of so many steps: hours x devices x the price of one for an hour."""
    return steps * seconds / 3600 * devices * price_per_hour


def table(found: Estimate, rates: Rates, peak: float, devices: int) -> Iterator[str]:
    """Lines: each phase with what one device does in it, then the step. ``peak``: FLOP/s."""
    rows = [(phase, *phase.seconds(rates)) for phase in found.phases]
    total = sum(seconds for _, seconds, _ in rows)
    yield found.note
    yield (
        f"{'phase':16} {'calls':>7} {'useful':>9} {'executed':>9} {'memory':>9} {'links':>9} "
        f"{'seconds':>8} {'share':>6}  bound by"
    )
    yield f"{'':16} {'':7} {'TFLOP':>9} {'TFLOP':>9} {'GB':>9} {'GB':>9}"
    for phase, seconds, limit in rows:
        numbers = [phase.useful / devices / 1e12, phase.total("flops") / 1e12]
        numbers.append(phase.total("memory") / 1e9)
        numbers.append(sum(map(phase.total, ("links", "network", "summed"))) / 1e9)
        cells = " ".join(f"{number:9.1f}" for number in numbers)
        share = seconds / total
        yield f"{phase.name:16} {phase.calls:7.0f} {cells} {seconds:8.2f} {share:6.1%}  {limit}"
    useful = sum(phase.useful for phase in found.phases)
    read, written = (tokens / total / devices for tokens in (found.tokens, found.written))
    yield (
        f"a step: {total:.1f} s, MFU {useful / devices / total / peak:.1%}, {read:,.0f} tokens/s a "
        f"device (a prompt counts with each of its samples; {written:,.0f} without prompts)"
    )
