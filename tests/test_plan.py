"""What a recipe needs on hardware that is not there: what is counted, which settings are read."""

import jax
import jax.numpy as jnp
import pytest

from configs import grpo as recipe
from srpo_jax.learn import optim
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.model import sharding
from srpo_jax.model.sizes import size_config
from srpo_jax.sampling.sampler import SamplingConfig
from srpo_jax.structs import RunError
from tools import plan
from tools.lib import recipes, topologies
from tools.lib.planned import Recipe, Shapes, read_recipe


@pytest.mark.parametrize("text", ["8", "1,8", "1,8,1,1", "1,,8", "1,8,x", "-2,1,1", "1x8x1", ""])
def test_a_mesh_is_three_numbers_in_a_named_order(text, capsys):
    words = ["--config=configs/grpo.py", "--topology=cuda:h100:1x8"]
    assert plan.make_parser().parse_args([*words, "--mesh=-1,8,1"]).mesh == (-1, 8, 1)
    with pytest.raises(SystemExit):
        plan.make_parser().parse_args([*words, f"--mesh={text}"])
    assert f"--mesh: {text!r} must be data,fsdp,tensor, as in 1,8,1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cuda:h100:8", "cuda:h100:1x8x1", "cuda:h100", "tpu:v5p", "h100"])
def test_a_topology_that_is_none_is_told_with_those_that_are(name):
    with pytest.raises(ValueError, match=f"unknown topology '{name}'; known: .*HOSTSxGPUS"):
        topologies.describe(name)


def parameters(dtype: str, part: str = "") -> int:
    """Bytes of the 3B's parameters whose paths begin with ``part``."""
    shapes = plan.abstract_params(size_config("3b", param_dtype=dtype))
    return sum(x.size * x.dtype.itemsize for path, x in shapes.items() if path.startswith(part))


def programs(mesh, *, kl_coef: float = 0.0, param_dtype: str = "float32") -> dict[str, int]:
    """Program -> bytes held beside it, of the 3B with a small batch."""
    shapes = Shapes(sequences=8, tokens=64, rows=8, patches=64)
    model = size_config("3b", dtype="bfloat16", param_dtype=param_dtype)
    step = GrpoConfig(kl_coef=kl_coef)
    sampling = SamplingConfig(max_new_tokens=8, group_size=2, segment=8)
    recipe = Recipe(model, mesh, shapes, optim.OptimConfig(), step, sampling)
    return {name: beside for name, _, beside in plan.programs(recipe)}


def test_bytes_of_an_array_are_those_of_its_shard():
    mesh = sharding.make_mesh(1, 4, 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    whole = sharding.replicated(mesh)
    tree = {
        "split": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=split),
        "whole": jax.ShapeDtypeStruct((5,), jnp.float32, sharding=whole),
    }
    assert plan.device_bytes(tree) == 8 * 6 * 2 // 8 + 5 * 4


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
    names = [name for name, _, _ in plan.programs(read_recipe(config, mesh))]
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
