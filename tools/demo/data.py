"""Writes everything the demo starts from: records of four splits, the tokenizer, random weights."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from srpo_jax.data.prompts import srpo_response
from srpo_jax.model.sizes import Shape
from tools.demo import tiles
from tools.demo.tasks import DOT_TILES, Task
from tools.demo.tokenizer import train_tokenizer, write_tokenizer
from tools.make_hf import TOKEN_KEYS, make_config, write_random_hf

BLOCK_FIELDS = ("first_think", "first_answer", "reflection", "second_think", "second_answer")
TOKENIZER_TEXTS = 4096  # records the tokenizer is trained on
# Kernels and embeddings ~ normal(0, 0.06), about 1 / sqrt(width). Hugging Face's 0.02 is meant for
# widths in the thousands; from it the model below still could not read the tiles after twice as
# many steps.
INIT_STD = 0.06
VOCAB_MULTIPLE = 128


def write_records(folder: Path, seed: int, sizes: dict[str, int], task: Task = DOT_TILES) -> None:
    """All splits as a user's data would come: the large one as parquet with the images inside, the
    others as JSONL with a PNG file each. Only ``sft`` has reflections."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, problems in tiles.draw_splits(seed, sizes, task.draw).items():
        answered = {"reflect": split == "sft", "fields": task.fields}
        rows = tiles.records(problems, seed, split, **answered, source=task.name.replace("_", " "))
        if split == "sft":
            tiles.write_parquet(folder / "sft.parquet", rows)
        else:
            tiles.write_jsonl(folder / f"{split}.jsonl", rows)


def sft_texts(folder: Path) -> Iterator[str]:
    """The text of the first SFT records, question and response."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(folder / "sft.parquet")
    columns = ["problem", *BLOCK_FIELDS]
    batches = (b.to_pylist() for b in table.iter_batches(batch_size=512, columns=columns))
    for row in itertools.islice(itertools.chain.from_iterable(batches), TOKENIZER_TEXTS):
        yield row["problem"]
        yield srpo_response(*(row[name] for name in BLOCK_FIELDS))
        yield from ("user\n", "assistant\n")


def write_model(data: Path, out_dir: Path, seed: int) -> int:
    """Train the tokenizer on the SFT text and write a random Qwen2.5-VL of about 1.1 million
    parameters as a Hugging Face directory; returns the size of the vocabulary."""
    tokenizer_dir = out_dir.with_name("tokenizer")
    ids = write_tokenizer(train_tokenizer(sft_texts(data)), tokenizer_dir)
    known = max(ids.values()) + 1
    shape = Shape(
        hidden=128,
        layers=3,
        heads=4,
        kv_heads=2,
        mlp=344,
        vocab_size=-(-known // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        vision_hidden=96,
        vision_depth=2,
        vision_heads=4,
        vision_mlp=256,
        full_blocks=(1,),
        tied=True,
    )
    config = make_config(shape, {key: ids[token] for key, token in TOKEN_KEYS.items()})
    # One window is one picture of four tiles; positions are few.
    config["vision_config"]["window_size"] = tiles.SIDE
    config["rope_theta"] = 10_000.0
    config["max_position_embeddings"] = 1024
    config["initializer_range"] = INIT_STD
    write_random_hf(out_dir, config, tokenizer_dir, seed=seed, dtype="float32", std=INIT_STD)
    return known
