"""Sources, encoders and loaders shared by the tests of the data pipeline."""

from dataclasses import dataclass

import numpy as np

from srpo_jax.data.batching import Media, encode_arrays
from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Record
from srpo_jax.data.loader import Loader
from srpo_jax.data.stream import LoaderConfig
from srpo_jax.data.vision_arrays import VisionIds
from srpo_jax.structs import RunError

PAD = 9


@dataclass
class Numbers:
    """A source of ``count`` records; those in ``bad`` cannot be read."""

    count: int
    bad: tuple = ()
    sizes: tuple = ()  # of the sources that a mix draws of

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.bad:
            raise RecordError(f"n:{i}", f"bad {i}")
        return Record(f"r{i}", "q", str(i), origin=f"n:{i}")


def encode(record):
    """Three tokens, the second of which is the record's number."""
    return encode_arrays([1, int(record.answer), 2], VisionIds(-1, -2), origin=record.origin)


def encode_with_images(record):
    """As many 64-slot windows as the record's number says (0 to 3: number modulo 4)."""
    windows = int(record.answer) % 4
    tokens = [1, *[90] * 16 * windows, 2]
    return encode_arrays(
        tokens,
        VisionIds(90, 91),
        Media(
            pixel_values=np.full((64 * windows, 1176), int(record.answer), np.float32),
            image_grid_thw=[[1, 8, 8 * windows]] if windows else (),
        ),
        origin=record.origin,
    )


def budget_of(loaded):
    """The patch budget that a batch was given."""
    return 0 if loaded.arrays.vision is None else loaded.arrays.vision.patches.shape[1]


def load(source, encoder=encode, **settings):
    base = {"global_batch_size": 4, "token_budget": 4, "seed": 3, "pad_id": PAD}
    base |= settings
    names = ("check_record", "gather", "quarantine_path", "say", "on_bad")
    others = {name: base.pop(name) for name in names if name in base}
    return Loader(source, encoder, LoaderConfig(**base), **others)


def ids_of(batch):
    return [r.id for r in batch.records]


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_same_batches(a, b):
    assert ids_of(a) == ids_of(b) and budget_of(a) == budget_of(b)
    for name in ("tokens", "segment_ids", "mrope", "vision_src", "lengths", "valid"):
        assert (getattr(a.arrays, name) == getattr(b.arrays, name)).all(), name
    if a.arrays.vision is not None:
        assert (a.arrays.vision.patches == b.arrays.vision.patches).all()


def lockstep(loaders):
    """Run the loaders of several processes together, as their ``gather`` demands."""
    import threading

    barrier, told, out = threading.Barrier(len(loaders)), {}, {}

    def gather_for(index):
        def gather(own):
            told[index] = own
            barrier.wait(20)
            everyone = [told[i] for i in range(len(loaders))]
            barrier.wait(20)
            return everyone

        return gather

    def run(index, loader):
        loader._everyone = gather_for(index)
        try:
            out[index] = list(loader)
        except RunError as error:
            out[index] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(loaders)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    return [out[i] for i in range(len(loaders))]
