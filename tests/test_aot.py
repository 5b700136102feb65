"""The real programs of the 7B recipe, compiled for hardware that is not there (slow tier)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}

pytestmark = pytest.mark.slow


def _run(platform: str, *command: str) -> str:
    """Runs in a process of its own: the compilers log and hold on to what they load."""
    if importlib.util.find_spec(NEEDS[platform]) is None:
        pytest.skip(f"{NEEDS[platform]} is not installed: bash tools/test.sh --slow installs it")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
    env["TF_CPP_MIN_LOG_LEVEL"] = "1"  # the partitioner only warns of what it replicates
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "full rematerialization" not in done.stderr, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("topology", ["tpu:v5p:2x2x2", "cuda:h100:1x8"])
@pytest.mark.parametrize(
    ("recipe", "programs"),
    [
        ("sft", {"sft_step"}),
        ("grpo", {"encode", "prefill", "decode_segment", "logp_step", "accumulate", "apply"}),
    ],
)
def test_the_7b_recipe_compiles_and_fits_eight_devices(recipe, programs, topology):
    table = _run(
        topology.partition(":")[0],
        *("-m", "tools.plan", f"--config=configs/{recipe}.py:size=7b", f"--topology={topology}"),
    )
    lines = [line.split() for line in table.splitlines()]
    fits = {words[0]: words[6] for words in lines if len(words) > 6 and words[0] in programs}
    assert fits == dict.fromkeys(programs, "yes"), table


ATTENTION = """
import jax, jax.numpy as jnp
from srpo_jax.model.attention import Mask, attention
from srpo_jax.model.sharding import make_mesh, batch_sharding
from tools.lib.topologies import describe

mesh = make_mesh(1, 4, 2, devices=describe("{topology}").devices)
def array(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
def loss(q, k, v, q_segments, kv_segments):
    out = attention(q, k, v, Mask(q_segments, kv_segments, q_offset=256))
    return out.astype(jnp.float32).sum()
args = (array((8, 512, 8, 128)), array((8, 768, 2, 128)), array((8, 768, 2, 128)),
        array((8, 512), jnp.int32), array((8, 768), jnp.int32))
with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile().as_text()
print("kernels:", text.count("{kernel}"))
"""


@pytest.mark.parametrize(
    ("topology", "kernel"),
    [("tpu:v5p:2x2x2", "tpu_custom_call"), ("cuda:h100:1x8", "__cudnn$fmha")],
)
def test_the_platforms_own_attention_kernel_is_what_compiles(topology, kernel):
    script = ATTENTION.format(topology=topology, kernel=kernel)
    out = _run(topology.partition(":")[0], "-c", script)
    assert int(out.split("kernels:")[1]) >= 2, out  # forward and backward
