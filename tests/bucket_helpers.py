"""A bucket for tests: gs:// paths lead to a folder, under the rules of an object store."""

import os
from pathlib import Path

from etils.epath import backend, gpath
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from srpo_jax.data import buckets, hf_folder


class _Objects(LocalFileSystem):
    """Objects are written at once and whole; folders come with what is in them."""

    cachable = False
    root = Path()

    @classmethod
    def _strip_protocol(cls, path):
        path = os.fspath(path)
        return str(cls.root / path.removeprefix("gs://")) if "://" in path else path

    def open(self, path, mode="rb", **options):
        assert mode in ("r", "rb", "w", "wb"), f"an object cannot be opened with {mode!r}"
        return super().open(path, mode, **options)


class _Backend(backend._FileSystemSpecBackend):
    def __init__(self, root: Path):
        self._objects = type("Objects", (_Objects,), {"root": root})(auto_mkdir=True)

    def fs(self, path):
        return self._objects

    def glob(self, path):
        found = self._objects.glob(self._objects._strip_protocol(path))
        return [f"gs://{os.path.relpath(one, self._objects.root)}" for one in found]


def mount(monkeypatch, root: Path) -> str:
    """``gs://bucket``, whose objects are files under ``root``, while ``monkeypatch`` lasts."""

    def on_disk(path: str) -> str:  # TensorStore has a driver of its own for buckets
        return os.path.normpath(path.replace("gs://", f"{root}/"))

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", _Backend(root))
    monkeypatch.setattr(tensorstore_utils, "_normalize_path", on_disk)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    monkeypatch.setattr(buckets, "LIBRARIES", ("fsspec",))
    hf_folder.small_files.cache_clear()
    (root / "bucket").mkdir(parents=True, exist_ok=True)
    return "gs://bucket"
