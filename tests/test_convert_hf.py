"""tools.convert_hf: there and back, in blocks, from checkpoints of training, with clear errors."""

import filecmp
import json

import jax
import numpy as np
import pytest
from test_hf import assert_same_tensors, read_all, write_tiny

from srpo_jax.model import hf, hf_write, sharding
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.run import checkpoint
from tools import convert_hf
from tools.lib import cli


def run(*arguments):
    """The tool's exit code, as from the command line."""
    with pytest.raises(SystemExit) as stop:
        cli.run(convert_hf.main, convert_hf.make_parser(), [str(a) for a in arguments])
    return stop.value.code


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_the_identity(tmp_path, dtype):
    write_tiny(tmp_path / "hf", dtype, tied=dtype == "bfloat16")
    assert run("import", "--hf_dir", tmp_path / "hf", "--out", tmp_path / "ckpt") == 0
    assert run("export", "--checkpoint", tmp_path / "ckpt", "--hf_dir", tmp_path / "back",
               "--reference", tmp_path / "hf") == 0  # fmt: skip
    names = [path.name for path in (tmp_path / "hf").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "hf", tmp_path / "back", names, False)[0] == names


def test_an_import_is_what_training_starts_from(tmp_path):
    cfg = write_tiny(tmp_path / "hf", "bfloat16")
    convert_hf.import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=lambda *_: None)
    specs = sharding.param_specs(abstract_params(cfg), sharding.make_mesh(1, 4, 2))
    loaded = checkpoint.load_params(tmp_path / "ckpt", specs, abstract_params(cfg), dtype="float32")
    wanted = hf.load_params(tmp_path / "hf", cfg, dtype="float32")
    assert loaded.keys() == wanted.keys()
    for path in wanted:
        assert loaded[path].sharding == specs[path] and loaded[path].dtype == np.float32
        assert np.array_equal(np.asarray(loaded[path]), np.asarray(wanted[path])), path
    meta = checkpoint.read_meta(tmp_path / "ckpt")
    assert meta["config"] == json.loads((tmp_path / "hf" / "config.json").read_text())


def test_parameters_of_a_sharded_run_export(tmp_path):
    """Float32 parameters as training holds them, written in the dtype of the reference."""
    cfg = write_tiny(tmp_path / "hf", "bfloat16")
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    specs = sharding.param_specs(abstract_params(cfg), mesh)
    params = hf.load_params(tmp_path / "hf", cfg, shardings=specs, dtype="float32")
    checkpoint.save_params(tmp_path / "run" / "checkpoints" / "7", params, {})
    convert_hf.export_hf(tmp_path / "run", tmp_path / "back", tmp_path / "hf", dtype="bfloat16")
    assert_same_tensors(read_all(tmp_path / "hf"), read_all(tmp_path / "back"))
    convert_hf.export_hf(tmp_path / "run", tmp_path / "full", tmp_path / "hf")
    assert {str(t.dtype) for t in read_all(tmp_path / "full").values()} == {"float32"}
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"


def test_no_more_than_a_chunk_is_held(tmp_path, monkeypatch):
    cfg = write_tiny(tmp_path / "hf")
    monkeypatch.setattr(convert_hf, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(hf_write, "BLOCK_BYTES", 2000)
    held = []
    for kind in (hf.HFLeaf, convert_hf.StoredLeaf):
        original = kind.__getitem__
        monkeypatch.setattr(
            kind,
            "__getitem__",
            lambda self, i, get=original: held.append((x := get(self, i)).nbytes) or x,
        )
    convert_hf.import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=lambda *_: None)
    assert max(held) <= 2000 and len(held) > 150
    held.clear()
    convert_hf.export_hf(tmp_path / "ckpt", tmp_path / "back", tmp_path / "hf")
    # A block of an HF tensor holds whole rows; the widest row is one channel of a patch: 1,176.
    assert max(held) <= 1176 * 4 and len(held) > 150
    assert_same_tensors(read_all(tmp_path / "hf"), read_all(tmp_path / "back"))
    assert len(hf.open_hf(tmp_path / "back", cfg)) == len(abstract_params(cfg))


@pytest.mark.parametrize(
    "shape, itemsize", [((64, 8192, 29568), 2), ((152064, 8192), 4), ((80, 64, 128), 4), ((7,), 4)]
)
def test_chunks_cover_a_parameter_once_in_small_pieces(shape, itemsize):
    chunk = convert_hf.chunk_shape(shape, itemsize)
    assert int(np.prod(chunk)) * itemsize <= convert_hf.CHUNK_BYTES
    assert len(shape) < 3 or chunk[0] == 1
    leaf = jax.ShapeDtypeStruct(shape, np.float32 if itemsize == 4 else jax.numpy.bfloat16)
    covered = 0
    for index in convert_hf.chunks(leaf):
        covered += int(np.prod([i.stop - i.start for i in index]))
    assert covered == int(np.prod(shape))


def test_errors_are_one_line_and_leave_nothing(tmp_path, capsys):
    write_tiny(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    cases = {
        ("import", "--hf_dir", tmp_path / "no", "--out", tmp_path / "x"): "no such directory",
        ("import", "--hf_dir", tmp_path / "hf", "--out", tmp_path / "hf"): "exists; give --out",
        ("export", "--checkpoint", tmp_path / "empty", "--hf_dir", tmp_path / "x", "--reference",
         tmp_path / "hf"): "no checkpoint here",
    }  # fmt: skip
    for arguments, text in cases.items():
        assert run(*arguments) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and text in error and "\n" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "hf"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    write_tiny(tmp_path / "hf")
    write_tiny(tmp_path / "tied", tied=True)
    assert run("import", "--hf_dir", tmp_path / "tied", "--out", tmp_path / "ckpt") == 0
    assert run("export", "--checkpoint", tmp_path / "ckpt", "--hf_dir", tmp_path / "x",
               "--reference", tmp_path / "hf") == 1  # fmt: skip
    assert "text/lm_head/kernel: the parameters have no such parameter" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
