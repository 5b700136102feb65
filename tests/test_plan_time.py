"""The estimate of a step's time: what is counted, by hand, and that it follows what it assumes."""

import argparse
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from srpo_jax.data.batching import Layout
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.learn.lanes import LaneBudgets
from srpo_jax.learn.optim import OptimConfig
from srpo_jax.learn.steps import SftConfig
from srpo_jax.model import sharding
from srpo_jax.model.sizes import Shape
from srpo_jax.run.lesson import work_of
from srpo_jax.sampling.sampler import SamplingConfig
from srpo_jax.sampling.schedule import Schedule
from tools.lib import assumed, roofline, step_time
from tools.lib.assumed import Lengths, parse_lengths
from tools.lib.collectives import collective_bytes
from tools.lib.planned import Recipe, Shapes
from tools.lib.roofline import Cost, Passes, Phase, Piece, Rates

MODEL = Shape(
    vocab_size=100,
    hidden=16,
    mlp=24,
    layers=2,
    heads=2,
    kv_heads=1,
    vision_mlp=12,
    vision_hidden=16,
    vision_depth=2,
    vision_heads=2,
    full_blocks=(1,),
).config(dtype="bfloat16")
# Of a layer: q and o 16 x 16, k and v 16 x 8, three of the mlp 16 x 24.
ENTRIES = 2 * (2 * 256 + 2 * 128 + 3 * 384)
TOKEN, PAIR, HEAD = 2 * ENTRIES, 4 * 2 * 16, 2 * 100 * 16  # FLOPs
TOKEN_BYTES = 2 * 2 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24))
CACHE_BYTES = 2 * 2 * 2 * 8


def recipe_of(step=None, **changes) -> Recipe:
    """8 prompts of 20 tokens x 2 samples of 40, in two rows of each of 4 shards; tensor 2."""
    mesh = sharding.make_mesh(1, 4, 2)
    layout = Layout(sequences=8, shards=4, rows=2, updates=2)
    step = step or GrpoConfig(micro_batches=2, updates_per_rollout=2, logit_chunk=16)
    parts = {
        "shapes": Shapes(sequences=8, tokens=20, rows=8, patches=64),
        "optimizer": OptimConfig(),
        "step": step,
        "sampling": SamplingConfig(max_new_tokens=40, group_size=2, eos_ids=(1,), pad_id=0),
        "budgets": LaneBudgets(layout, 2, 20, 40),
    }
    return Recipe(MODEL, mesh, **(parts | changes))


def phases_of(found: step_time.Estimate) -> dict[str, Phase]:
    return {phase.name: phase for phase in found.phases}


def test_a_pass_costs_a_device_its_share_of_the_products_and_every_weight():
    cost = Cost.of(MODEL, sharding.make_mesh(1, 4, 2))
    assert (cost.shards, cost.tensor) == (4, 2)
    piece = cost.text(tokens=80, pairs=1000, head_tokens=24, passes=Passes(4, 3, 2))
    assert piece.flops == (4 * 80 * TOKEN + 3 * 1000 * PAIR + 2 * 24 * HEAD) / 8
    weights = 2 * (4 * 2 * ENTRIES + 2 * 2 * 1600) / 2  # bfloat16, written and read, over tensor
    assert piece.memory == weights + (4 * 80 * TOKEN_BYTES + 2 * 24 * 100 * 2 * 4) / 8


def test_a_decoded_token_reads_weights_once_for_all_slots_and_the_window_of_each():
    cost = Cost.of(MODEL, sharding.make_mesh(1, 4, 2))
    piece = cost.decode(slots=6, window=5, cached=(3, 2, 7))
    assert piece.flops == (6 * (TOKEN + HEAD) + (6 * 5 + 3 * 2 * 7) * PAIR) / 2
    # One key/value head is not divided over tensor; prompts are read once for their samples.
    caches = (3 * 7 + 6 * 5) * CACHE_BYTES
    assert piece.memory == (2 * ENTRIES + 2 * 1600 + 6 * 100 * 4 * 4) / 2 + caches


def test_a_call_takes_as_long_as_what_binds_it():
    phase = Phase("x", 0.0, (Piece(3, 8.0, 2.0, 1.0), Piece(1, 1.0, 1.0, 50.0)))
    assert phase.seconds(Rates(2.0, 1.0, 10.0)) == (3 * 4.0 + 5.0, "matmul")
    assert phase.seconds(Rates(8.0, 1.0, 10.0)) == (3 * 2.0 + 5.0, "memory")
    assert phase.seconds(Rates(8.0, 4.0, 5.0)) == (3 * 1.0 + 10.0, "links")
    assert phase.total("flops") == 25.0 and phase.calls == 4


def test_a_step_of_full_lengths_by_hand():
    found = phases_of(step_time.estimate(recipe_of(), Lengths(), Lengths()))
    assert found["prefill"].calls == 2  # of every shard's two prompts
    assert found["decode_segment"].calls == 39  # the first token is prefill's
    cost = Cost.of(MODEL, sharding.make_mesh(1, 4, 2))
    assert found["decode_segment"].pieces == (Piece(39, *vars_of(cost.decode(4, 40, (2, 2, 20)))),)
    # A row: a region of 20 slots (24 rounded up is cut at the budget), two lanes of 40.
    tokens, pairs = 4 * (20 + 80), 4 * (20**2 + 80 * (20 + 40))
    (piece,) = set(found["accumulate"].pieces)
    assert found["accumulate"].calls == 2
    assert piece == cost.text(tokens, pairs, 4 * 80, roofline.TRAIN["block"])
    assert piece.flops == (4 * tokens * TOKEN + 4 * pairs * PAIR + 4 * 320 * HEAD) / 8
    # Of two updates the first needs no old log-probs.
    assert found["logp_step"].pieces == (cost.text(tokens, pairs, 4 * 80),)
    assert found["apply"].calls == 2


def vars_of(piece: Piece) -> tuple[float, ...]:
    return dataclasses.astuple(piece)[1:]


def test_what_devices_exchange_by_hand():
    cost = Cost.of(MODEL, sharding.make_mesh(2, 2, 2), trained=1000)
    train, weights = roofline.TRAIN["block"], 2 * (ENTRIES + 1600) / 2  # bfloat16, over tensor
    piece = cost.text(tokens=80, pairs=1000, head_tokens=24, passes=train)
    # Weights collected for two passes, their gradients scattered; sums over data of float32.
    assert piece.links == 3 * weights + 2 * 4 * 1000 / 4 and piece.network == 0
    # Of a layer five sums of a shard's 20 tokens, each sent about twice.
    assert (piece.sums, piece.summed) == (2 * 5, 2 * 5 * 20 * 2 * 16 * 2)
    assert cost.decode(6, 5, (3, 2, 7)).summed == 2 * 2 * 6 * 2 * 16 * 2
    alone = Cost.of(MODEL, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]), trained=1000)
    piece = alone.text(80, 1000, 24, train)
    assert piece.links == piece.network == piece.summed == 0


@pytest.mark.parametrize(
    ("across", "links", "network"), [("", 17, 0), ("data", 7, 10), ("all", 0, 17)]
)
def test_what_crosses_slices_takes_the_network(across, links, network):
    cost = dataclasses.replace(Cost.of(MODEL, sharding.make_mesh(2, 4, 1)), across=across)
    piece = cost.exchanged(Piece(1, 1.0, 1.0), 7.0, 10.0)
    assert (piece.links, piece.network) == (links, network)
    slow = Rates(1e9, 1e9, 1e9, 1.0)
    assert piece.seconds(slow)[0] == (network or pytest.approx(0, abs=1e-6))


def test_steps_cost_hours_of_all_devices():
    assert step_time.cost(36.0, devices=8, price_per_hour=2.5) == 10 * 8 * 2.5


def test_useful_flops_are_those_of_trainings_own_utilisation():
    step = GrpoConfig(micro_batches=2, updates_per_rollout=2, logit_chunk=16, kl_coef=0.1)
    lengths, prompts = Lengths(15, 0.6), Lengths(12, 0.2)
    found = step_time.estimate(recipe_of(step), lengths, prompts)
    rng = np.random.default_rng(0)
    prompts_P = prompts.draw(rng, (8,), 20)
    mask = np.arange(40) < lengths.draw(rng, (8, 2), 40)[..., None]
    batch = SimpleNamespace(lengths=prompts_P, valid=np.ones(8, bool), vision=None)
    local = SimpleNamespace(batch=batch, rollout=SimpleNamespace(completion_mask=mask))
    flops = Cost.of(MODEL, sharding.make_mesh(1, 4, 2)).flops
    parts = SimpleNamespace(flops=flops, model=MODEL)
    round_ = SimpleNamespace(local=local, sampled=SimpleNamespace(local=batch))
    lesson = SimpleNamespace(local=local, rounds=[round_])
    kinds = {"refers": True, "trains_vision": False}
    tokens, work = work_of(lesson, mask.sum(-1), step, parts, **kinds)
    useful = sum(phase.useful for phase in found.phases if phase.name != "encode")
    assert useful == pytest.approx(work)
    assert found.written + prompts_P.sum() == tokens
    assert found.tokens == mask.sum() + 2 * prompts_P.sum()  # each sample reads its prompt


@pytest.mark.parametrize("remat", ["none", "block", "dots"])
def test_more_efficiency_never_takes_longer(remat):
    model = Shape(100, 16, 24, 2, 2, 1, 12, False, 16, 2, 2, (1,)).config(remat=remat)
    sft = Recipe(
        model, sharding.make_mesh(1, 8, 1), Shapes(16, 64, 16, 64), OptimConfig(), SftConfig(2, 16)
    )
    for recipe in (recipe_of(), sft):
        found = step_time.with_links(step_time.estimate(recipe, None, None), {"accumulate": 1e5})
        seconds = []
        for matmul, moving in ((0.1, 0.1), (0.1, 0.5), (0.5, 0.5), (1.0, 1.0)):
            rates = Rates(1e9 * matmul, 1e8 * moving, 1e7 * moving)
            seconds.append(sum(phase.seconds(rates)[0] for phase in found.phases))
        assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]


def test_sft_computes_the_rows_that_packing_leaves():
    """16 conversations of 100 tokens on 8 shards: one sequence holds a shard's two."""
    model = Shape(100, 16, 24, 2, 2, 1, 12, False, 16, 2, 2, (1,)).config()
    mesh, shapes = sharding.make_mesh(1, 8, 1), Shapes(16, 1024, 16, 512)
    found = {}
    for packed in (True, False):
        step = SftConfig(2, 16, packed=packed)
        recipe = Recipe(model, mesh, shapes, OptimConfig(), step)
        found[packed] = step_time.estimate(recipe, Lengths(100.5, 1e-6), None)
    assert found[True].phases[0].calls == 1 and found[False].phases[0].calls == 2
    assert found[True].phases[0].useful == found[False].phases[0].useful
    # Two of 100 tokens stand in a quarter of 1,024: 200 of 256 slots, beside 100 of 1,024 each.
    assert "padding 21.9%" in found[True].note and "padding 90.2%" in found[False].note


def test_collected_bytes_are_counted_for_the_programs_that_were_compiled():
    found = step_time.estimate(recipe_of(), None, None)
    before = phases_of(found)
    piece = before["accumulate"].pieces[0]
    linked = phases_of(step_time.with_links(found, {"accumulate": piece.summed + 7.0}))
    assert linked["accumulate"].total("links") == 7.0 * linked["accumulate"].calls
    assert linked["logp_step"] == before["logp_step"]
    lines = list(step_time.table(found, Rates(1e9, 1e9, 1e9), 1e9, 8))
    assert "tokens/s a device" in lines[-1] and "idle slots" in lines[0]


def test_sampling_is_run_as_the_schedule_says():
    lengths = np.random.default_rng(1).integers(0, 41, (2, 6 * 3))
    plan = Schedule(2, 6, 2, 3, 40, 8)
    done = assumed.sample(plan, lengths)
    assert plan.over and plan.live_steps == (lengths - 1).clip(0).sum()
    assert done.steps.total() == plan.step and 6 <= done.prefills <= 12
    assert {slots for slots, _ in done.steps} <= set(plan.widths)
    whole = assumed.sample(Schedule(1, 4, 4, 2, 40, 8), np.full((1, 8), 40))
    assert whole.prefills == 4 and whole.steps == {(8, 40): 39} and not whole.moves


def test_lengths_have_their_mean_and_end_at_the_budget():
    drawn = parse_lengths("lognormal:870,0.5").draw(np.random.default_rng(0), (4000,), 2048)
    assert 840 < drawn.mean() < 870 and drawn.max() == 2048 and drawn.min() >= 1
    assert (parse_lengths("full").draw(np.random.default_rng(0), (3,), 9) == 9).all()
    for text in ("lognormal:870", "lognormal:0,1", "870", "lognormal:a,b"):
        with pytest.raises(argparse.ArgumentTypeError, match="neither full nor lognormal"):
            parse_lengths(text)


PROGRAM = """\
%body.1 (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %g = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%x), dimensions={0}
  %d = bf16[32,8]{1,0} all-gather-done(%g)
  %r = bf16[4,8]{1,0:T(8,128)(2,1)} reduce-scatter(%d), dimensions={0}, to_apply=%add.1
}

%branch.1 (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %s = f32[2]{0} all-reduce(%p), to_apply=%add.1
}

ENTRY %main.1 (p: bf16[4,8]) -> bf16[4,8] {
  %p0 = f32[16]{0} parameter(0)
  %w = (s32[], bf16[4,8]{1,0}) while(%t), condition=%c, body=%body.1, TRIPS
  %a = ((f32[16]{0}), f32[16]{0}) all-to-all-start(%p0), dimensions={0}
  %b = f32[2]{0} conditional(%k, %p0, %p0), branch_computations={%branch.1, %other}
}
"""


def test_collectives_are_counted_with_the_trips_of_their_loops():
    program = PROGRAM.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"},"more":1}')
    gathered = 32 * 8 * 2
    assert collective_bytes(program) == 3 * (gathered + gathered) + 16 * 4 + 2 * 2 * 4


def test_collectives_are_found_in_what_the_compiler_prints():
    mesh = sharding.make_mesh(1, 8, 1)
    apart = NamedSharding(mesh, PartitionSpec("fsdp"))

    def program(x):
        one = lambda _, y: jnp.sin(y @ x.sum(0))  # noqa: E731  (a sum over devices each time)
        return jax.lax.fori_loop(0, 5, one, x[0])

    x = jax.ShapeDtypeStruct((16, 32, 32), jnp.float32, sharding=apart)
    text = jax.jit(program).lower(x).compile().as_text()
    assert collective_bytes(text) >= 2 * 32 * 32 * 4
