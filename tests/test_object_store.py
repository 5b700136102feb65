"""A run whose data, weights and export lie in a bucket, on a server of Cloud Storage's protocol.

Its checkpoints stay on the disk: the server does not know the conditions (generations) that
TensorStore writes under, so that what it answers is a matter of chance.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import train_helpers as helpers
from simulated import xla_flags

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def store(monkeypatch):
    """A file system on the server's bucket; programs that are started find the server too."""
    server = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "STORAGE_EMULATOR_HOST": f"http://localhost:{port}",  # of gcsfs and Google's own client
        "GOOGLE_CLOUD_PROJECT": "none",
        "FSSPEC_GCS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC, which it lacks
    }.items():
        monkeypatch.setenv(name, value)
    gcsfs = pytest.importorskip("gcsfs")  # which reads some of them when it is imported
    running = server.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    running.start()
    try:
        yield gcsfs.GCSFileSystem(token="anon", endpoint_url=f"http://localhost:{port}")
    finally:
        running.stop()


@pytest.mark.slow
def test_a_run_reads_and_exports_in_an_object_store(store, tmp_path):
    helpers.world(tmp_path / "world")
    for path in (tmp_path / "world").rglob("*"):
        if path.is_file():
            store.pipe_file(f"bucket/{path.relative_to(tmp_path / 'world')}", path.read_bytes())
    words = [
        *("--config=configs/sft.py:size=tiny,mode=debug", f"--workdir={tmp_path / 'run'}"),
        *("--config.hf_dir=gs://bucket/hf", "--config.data.train=gs://bucket/train.jsonl"),
        *("--config.max_pixels=3136", "--config.data.patch_budgets=(128,)"),
        *("--config.data.tokens=288", "--config.data.prompt_tokens=64"),
        "--config.export_hf_dir=gs://bucket/two",
    ]
    command = [sys.executable, "-m", "srpo_jax.train_sft", *words]
    environment = os.environ | {"XLA_FLAGS": xla_flags()}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "2 steps, from weights of gs://bucket/hf" in run.stdout
    before, after = (store.cat_file(f"bucket/{name}/model.safetensors") for name in ("hf", "two"))
    assert len(after) > 1000 and before != after
    assert not [name for name in store.find("bucket/two") if name.endswith((".tmp", ".partial"))]
