"""What a recipe needs on hardware that is not there: what is counted, which settings are read."""

import jax
import jax.numpy as jnp
import pytest

from configs import grpo as recipe
from srpo_jax.learn import optim
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.model import sharding
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.model.sizes import size_config
from srpo_jax.sampling.sampler import SamplingConfig
from srpo_jax.structs import RunError
from tools import plan
from tools.lib import programs as lowered
from tools.lib import recipes, search, topologies
from tools.lib.counted import count
from tools.lib.planned import Recipe, Shapes, read_recipe
from tools.lib.roofline import Rates


@pytest.mark.parametrize("text", ["8", "1,8", "1,8,1,1", "1,,8", "1,8,x", "-2,1,1", "1x8x1", ""])
def test_a_mesh_is_three_numbers_in_a_named_order(text, capsys):
    words = ["--config=configs/grpo.py", "--topology=cuda:h100:1x8"]
    assert plan.make_parser().parse_args([*words, "--mesh=-1,8,1"]).mesh == (-1, 8, 1)
    with pytest.raises(SystemExit):
        plan.make_parser().parse_args([*words, f"--mesh={text}"])
    assert f"--mesh: {text!r} must be data,fsdp,tensor, as in 1,8,1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "cuda:h100:1x8:2",
        "tpu:v5p:2x2x2:0",
        "cuda:h100:8",
        "cuda:h100:1x8x1",
        "cuda:h100",
        "tpu:v5p",
        "h100",
    ],
)
def test_a_topology_that_is_none_is_told_with_those_that_are(name):
    with pytest.raises(ValueError, match=f"unknown topology '{name}'; known: .*HOSTSxGPUS"):
        topologies.describe(name)


def parameters(dtype: str, part: str = "") -> int:
    """Bytes of the 3B's parameters whose paths begin with ``part``."""
    shapes = abstract_params(size_config("3b", param_dtype=dtype))
    return sum(x.size * x.dtype.itemsize for path, x in shapes.items() if path.startswith(part))


def programs(mesh, *, kl_coef: float = 0.0, param_dtype: str = "float32") -> dict[str, int]:
    """Program -> bytes held beside it, of the 3B with a small batch."""
    shapes = Shapes(sequences=8, tokens=64, rows=8, patches=64)
    model = size_config("3b", dtype="bfloat16", param_dtype=param_dtype)
    step = GrpoConfig(kl_coef=kl_coef)
    sampling = SamplingConfig(max_new_tokens=8, group_size=2, segment=8)
    recipe = Recipe(model, mesh, shapes, optim.OptimConfig(), step, sampling)
    return {name: beside for name, _, beside in lowered.programs(recipe)}


def test_bytes_of_an_array_are_those_of_its_shard():
    mesh = sharding.make_mesh(1, 4, 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    whole = sharding.replicated(mesh)
    tree = {
        "split": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=split),
        "whole": jax.ShapeDtypeStruct((5,), jnp.float32, sharding=whole),
    }
    assert lowered.device_bytes(tree) == 8 * 6 * 2 // 8 + 5 * 4


def test_the_state_stands_beside_sampling_and_shared_parameters_count_once():
    one = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    features = 8 * 16 * 2048 * 2  # [rows, patches / 4, width], bfloat16
    full, tower = parameters("float32"), parameters("float32", "vision/")
    decoder = full - tower
    apart, shared = programs(one), programs(one, param_dtype="bfloat16")
    moments = apart["encode"] - decoder  # encode reads the tower alone
    # Two moments of the decoder, and counters; none of the frozen tower.
    assert 0 <= moments - 2 * decoder < 100
    assert apart["logp_step"] == moments + tower
    # What the sampler reads, in bfloat16 and an array a layer, is an argument and none of these.
    assert apart["decode_segment"] == apart["prefill"] == full + moments + features
    # Of parameters that are bfloat16 already all but the layers are the same arrays.
    same = parameters("bfloat16", "text/") - parameters("bfloat16", "text/layers/")
    decoder = parameters("bfloat16", "text/")
    assert shared["decode_segment"] == shared["logp_step"] + decoder + features - same
    # A micro-batch reads neither the moments nor, with features given, the tower.
    assert apart["accumulate"] == moments + tower
    assert features < apart["apply"] == shared["apply"] < features + 20_000  # and the rollout


def test_a_reference_is_held_all_the_time():
    one = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    without, with_it = programs(one), programs(one, kl_coef=0.1)
    reference = with_it["accumulate"] - without["accumulate"]
    assert parameters("bfloat16") * 0.7 < reference < parameters("bfloat16")  # the trained part
    for name in ("encode", "prefill", "decode_segment", "logp_step", "accumulate"):
        assert with_it[name] - without[name] == reference


def test_settings_are_read_as_in_training_and_what_cannot_run_is_refused():
    config = recipe.get_config("size=7b")
    mesh = sharding.make_mesh(1, 8, 1)
    names = [name for name, _, _ in lowered.programs(read_recipe(config, mesh))]
    assert names == ["encode", "prefill", "decode_segment", "logp_step", "accumulate", "apply"]
    config.update_from_flattened_dict(
        {
            key: recipes.parsed(config, key, text)
            for key, text in (
                ("data.prompts_per_row", "4"),
                ("data.patch_budgets", "(64, 128)"),
                ("filter.resample", "true"),
            )
        }
    )
    assert config.data.prompts_per_row == 4 and config.filter.resample is True
    assert tuple(config.data.patch_budgets) == (64, 128)
    config.grpo.updates_per_rollout = 3
    with pytest.raises(RunError, match="=3 must divide data.global_batch_size=128: .*rollout=2$"):
        read_recipe(config, mesh)


# --- counted -------------------------------------------------------------------------------------


def by_hand() -> tuple[int, int, int]:
    """Numbers of the 7B: matrices of the decoder, its vectors, the tower."""
    wide, mlp, heads, kv, size = 3584, 18_944, 28, 4, 128
    layer = 2 * wide * heads * size + 2 * wide * kv * size + 3 * wide * mlp
    vectors = 28 * (2 * wide + (heads + 2 * kv) * size) + wide
    tower = 676_550_144
    return 28 * layer + 2 * 152_064 * wide, vectors, tower


def test_parameter_and_optimizer_bytes_are_those_of_a_hand_count():
    matrices, vectors, tower = by_hand()
    assert matrices + vectors + tower == 8_292_166_656
    config, mesh = recipe.get_config("size=7b"), sharding.make_mesh(1, 8, 1)
    held = count(read_recipe(config, mesh))
    own = 4 * (matrices // 8 + vectors)  # what is divided over fsdp, and what is not
    apart = held.parameters - own
    assert 4 * tower // 8 < apart < 4 * tower // 8 * 1.01  # the tower's vectors are whole as well
    assert 0 <= held.optimizer - 2 * own < 100  # two moments of the decoder, none of the tower
    assert held.gradients == 2 * own
    # Both moments in 8 bits: a byte each, and 4 for each block, of 56 of a width of 3,584 or of 74
    # of the mlp's 18,944; 128 of a head; the few that are too short stay as they are.
    config.optim.moment_dtype = "int8"
    blocks, narrow = count(read_recipe(config, mesh)).optimizer, 2 * (matrices // 8 + vectors)
    assert 1 + 4 / 128 < blocks / narrow < 1 + 4 / 55
    config.optim.moment_dtype, config.optim.offload = "float32", True
    waits = count(read_recipe(config, mesh))
    assert (waits.optimizer, waits.host, waits.moved) == (0, held.optimizer, held.optimizer)
    assert held.sampling - waits.sampling == held.optimizer / 2**30
    config.optim.offload = False
    # In bfloat16 over fsdp and tensor half and a quarter; moments stay float32.
    config.model.param_dtype, config.mesh.tensor = "bfloat16", 2
    divided = count(read_recipe(config, sharding.make_mesh(2, 2, 2)))
    assert 0 < divided.parameters - 2 * (matrices + tower) // 4 < 2 * 1.1e6 + 0.005 * tower
    assert divided.optimizer > 8 * matrices // 4


@pytest.mark.parametrize(
    ("size", "changes", "sampling", "updating"),
    [
        ("7b", {}, 40.7, 36.8),
        ("7b", {"model.remat": "offload"}, 40.7, 29.5),
        ("7b", search.LORA, 32.1, 19.7),
        ("3b", {"data.prompts_per_row": 1}, None, 14.3),
        ("3b", {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}, 22.2, 24.7),
    ],
)
def test_the_count_is_near_what_was_compiled(size, changes, sampling, updating):
    """GiB of GRPO's recipes on eight H100, by the compiler."""
    held = count(search.recipe_of(recipe.get_config(f"size={size}"), eight(), changes))
    assert held.updating == pytest.approx(updating, rel=0.08)
    assert sampling is None or held.sampling == pytest.approx(sampling, rel=0.01)


# --- search --------------------------------------------------------------------------------------


def eight(memory_gib: float = 80.0, slices: int = 1) -> topologies.Topology:
    return topologies.Topology("eight", tuple(jax.devices()), memory_gib, 3e12, 4e11, 1e10, slices)


def test_meshes_take_all_devices_and_keep_fsdp_within_a_slice():
    sizes = [tuple(mesh.values()) for mesh in search.meshes(eight())]
    assert len({*sizes}) == len(sizes) == 10
    assert all(data * fsdp * tensor == 8 for data, fsdp, tensor in sizes)
    apart = [tuple(mesh.values()) for mesh in search.meshes(eight(slices=4))]
    assert apart == [(4, 2, 1), (8, 1, 1), (4, 1, 2)]


@pytest.mark.slow
def test_a_search_gives_what_fits_and_can_be_told_as_overrides(monkeypatch):
    monkeypatch.setattr(
        search, "meshes", lambda _: [{"mesh.fsdp": 8}, {"mesh.fsdp": 4, "mesh.tensor": 2}]
    )
    monkeypatch.setattr(search, "ROWS", (2,))
    config = recipe.get_config("size=7b")
    found = [*search.settings(config, eight(), 38.0, (None, None))]
    assert [s.recipe.mesh.shape["tensor"] for s in found] == [1, 1, 2, 2]
    assert ["lora.rank" in s.changes for s in found] == [False, True] * 2
    assert all(s.held.most <= 38.0 for s in found)
    whole = found[0].changes  # decoding all 8 rows at once would take 40.7 GiB
    assert whole["sampling.concurrent_rows"] == 4 and whole["model.remat"] == "block"
    words = search.overrides(config, whole)
    assert words == "--config.mesh.fsdp=8 --config.sampling.concurrent_rows=4"
    rates = Rates(1e14, 1e12, 1e11)
    head, *lines = search.ranking(config, found, rates, 2.0)
    assert "1,000 steps" in head and len(lines) == 4 and "1,8,1" in lines[0]


def test_patch_budgets_follow_the_prompts_of_a_row():
    config = recipe.get_config("size=7b")
    changed = search.changed(config, {"data.prompts_per_row": 1})
    assert changed.data.patch_budgets == (1024, 2048, 3584)
    assert config.data.patch_budgets == (2048, 4096, 7168)
    told = search.overrides(config, {"data.prompts_per_row": 1})
    assert '--config.data.patch_budgets="(1024, 2048, 3584)"' in told


@pytest.mark.slow
def test_a_plan_that_does_not_fit_is_told_what_would(monkeypatch):
    some = [n for n in search.REMEDIES if "sampling.concurrent_rows" not in n or 4 in n.values()]
    monkeypatch.setattr(search, "REMEDIES", [n for n in some if 8 not in n.values()][:4])
    config = recipe.get_config("size=7b")
    ways = search.remedies(config, eight(), 38.0, 0.0)  # 40.7 while sampling
    assert ways[0] == "--config.sampling.concurrent_rows=4"
    assert "--config.mesh.tensor=2" in ways and not any("prompts_per_row" in way for way in ways)
    # Neither sampling nor updating fits: two changes where no single one is enough.
    (both,) = search.remedies(config, eight(), 30.0, 0.0)
    assert "concurrent_rows=4" in both and "prompts_per_row=1" in both
    assert search.remedies(config, eight(), 1.0, 0.0) == []
