"""Seconds of a program from what it computes and moves, and a machine's rates (a roofline).

Everything here is per device. A call takes as long as the slowest of its four: FLOPs, bytes to and
from memory, bytes to other devices, bytes to other slices; the rest is taken to be hidden behind
it. Sums over tensor hide nothing behind themselves: they come on top.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from srpo_jax.model.config import ModelConfig
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.model.sharding import num_data_shards
from srpo_jax.run.metrics import ModelFlops

LIMITS = ("matmul", "memory", "links", "network")  # what may bind, in the order of `Piece`
LOGIT_BYTES = 2 * 4  # of a logit in a pass: float32, written and read
SUM_SECONDS = 1e-5  # that a sum over tensor takes at least, however small
DRAW_BYTES = 4 * 4  # of a logit that is drawn from: written, and read for maximum, sums and choice


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device reaches: FLOP/s, bytes/s of its memory, to other devices, to other slices."""

    flops: float
    memory: float
    links: float
    network: float = math.inf


@dataclasses.dataclass(frozen=True)
class Piece:
    """Calls of one shape: of each the FLOPs, the bytes moved in memory, between devices and between
    slices; sums over tensor and their bytes."""

    calls: float
    flops: float
    memory: float
    links: float = 0.0
    network: float = 0.0
    sums: float = 0.0
    summed: float = 0.0

    def seconds(self, rates: Rates) -> tuple[float, str]:
        """Of all its calls, and which of LIMITS binds."""
        names = ("flops", "memory", "links", "network")
        need = [getattr(self, name) / getattr(rates, name) for name in names]
        on_top = self.summed / rates.links + self.sums * SUM_SECONDS
        limit = LIMITS[need.index(max(need))] if max(need) >= on_top else "links"
        return self.calls * (max(need) + on_top), limit


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a step. ``useful`` are its model FLOPs, as `ModelFlops` counts them."""

    name: str
    useful: float
    pieces: tuple[Piece, ...]

    def total(self, name: str) -> float:
        """Sum over calls of one of the Piece's numbers."""
        return sum(piece.calls * getattr(piece, name) for piece in self.pieces)

    @property
    def calls(self) -> float:
        """Of its program."""
        return sum(piece.calls for piece in self.pieces)

    def seconds(self, rates: Rates) -> tuple[float, str]:
        """Of all its calls, and what binds for most of that time."""
        by_limit: dict[str, float] = dict.fromkeys(LIMITS, 0.0)
        for piece in self.pieces:
            seconds, limit = piece.seconds(rates)
            by_limit[limit] += seconds
        return sum(by_limit.values()), max(by_limit, key=by_limit.__getitem__)


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often something is done that a forward pass does once."""

    products: float = 1  # of the layers, with their weights
    pairs: float = 1  # of attention
    head: float = 1
    collected: float = 1  # weights, over fsdp: once a pass, and gradients once
    sums: float = 2  # results of a layer, over tensor: attention's and the mlp's
    gradients: float = 0  # of all that is trained, summed over data


# Forward, and backward for inputs and weights; under remat what is not kept once more. The head is
# always recomputed; the last sum of a layer is not.
TRAIN = {"none": Passes(3, 3, 4, 3, 4, 1), "block": Passes(4, 4, 4, 3, 5, 1)}
TRAIN["offload"] = TRAIN["block"]
TRAIN_OTHERS = Passes(3, 4, 4, 3, 4, 1)  # products are kept, attention is not


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model's passes cost one device of a mesh."""

    flops: ModelFlops
    shards: int  # data shards; a device computes 1 / (shards * tensor) of a batch
    tensor: int
    vocabulary: int
    layers: float  # bytes of the decoder layers' matrices in the compute dtype, whole
    head: float  # bytes of the head, likewise
    token_bytes: float  # inputs and results of the layers' products, per token
    cache_bytes: float  # keys and values of a token on one device
    tower: float  # bytes of the vision tower's matrices, whole
    patch_bytes: float  # inputs and results of the blocks' products, per patch
    fsdp: int
    across: str  # "": one slice; "data": that axis crosses slices; "all": fsdp does too
    depth: int  # layers whose results are summed over tensor; 0: there is no such axis
    sum_bytes: float  # of a token in such a sum
    gradient_bytes: float  # float32 of what is trained, on one device, for a sum over data

    @classmethod
    def of(cls, model: ModelConfig, mesh: Mesh, trained: int = 0) -> "Cost":
        """From shapes alone. ``trained``: number of parameters with a gradient."""
        shapes, text, tensor = abstract_params(model), model.text, mesh.shape["tensor"]
        item = jnp.dtype(model.dtype).itemsize
        kv_parts = tensor if text.num_key_value_heads % tensor == 0 else 1
        kv = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        slices = len({getattr(device, "slice_index", None) for device in mesh.devices.flat})
        apart = "all" if mesh.shape["data"] % slices else "data"
        parts = mesh.shape["fsdp"] * tensor
        return cls(
            flops=ModelFlops.of(shapes, len(model.vision.fullatt_block_indexes)),
            shards=num_data_shards(mesh),
            tensor=tensor,
            vocabulary=text.vocab_size,
            layers=item * _size(shapes, "text/layers/"),
            head=item * text.vocab_size * text.hidden_size,
            token_bytes=item * _in_and_out(shapes, "text/layers/", text.hidden_size),
            cache_bytes=item * kv / kv_parts,
            tower=item * _size(shapes, "vision/"),
            patch_bytes=item * _in_and_out(shapes, "vision/blocks/", model.vision.hidden_size),
            fsdp=mesh.shape["fsdp"],
            across=apart if slices > 1 else "",
            depth=text.num_hidden_layers if tensor > 1 else 0,
            sum_bytes=2 * text.hidden_size * item,  # an all-reduce sends about twice its operand
            gradient_bytes=2 * 4 * trained / parts if mesh.shape["data"] > 1 else 0.0,
        )

    def exchanged(self, piece: Piece, weights: float, gradients: float = 0.0) -> Piece:
        """``piece`` with bytes of weights collected over fsdp and of gradients summed over data."""
        fast, slow = (weights if self.fsdp > 1 else 0.0), gradients
        if self.across != "data":
            fast, slow = fast + slow, 0.0
        fast, slow = (0.0, fast) if self.across == "all" else (fast, slow)
        return dataclasses.replace(piece, links=fast, network=slow)

    def summed(self, piece: Piece, tokens: float, sums: float) -> Piece:
        """``piece`` with so many sums over tensor in each layer, of a device's tokens."""
        sums *= self.depth
        return dataclasses.replace(piece, sums=sums, summed=sums * tokens * self.sum_bytes)

    # Its numbers of tokens are of all data shards, and head_tokens may differ from tokens.
    def text(
        self, tokens: float, pairs: float, head_tokens: float, passes: Passes = Passes()
    ) -> Piece:
        """One call: tokens through the layers, (query, key) pairs, tokens through the head.

        Weights are written when they are collected and read by the product, once a pass.
        """
        parts = self.shards * self.tensor
        flops = passes.products * tokens * self.flops.text_token
        flops += passes.pairs * pairs * self.flops.text_pair
        flops += passes.head * head_tokens * self.flops.head_token
        memory = passes.products * (tokens * self.token_bytes / parts)
        memory += 2 * passes.products * self.layers / self.tensor
        memory += passes.head * head_tokens * self.vocabulary * LOGIT_BYTES / parts
        memory += 2 * passes.head * self.head / self.tensor if head_tokens else 0.0
        weights = self.layers + (self.head if head_tokens else 0.0)
        collected, gradients = passes.collected * weights / self.tensor, passes.gradients
        piece = self.summed(Piece(1, flops / parts, memory), tokens / self.shards, passes.sums)
        return self.exchanged(piece, collected, gradients * self.gradient_bytes)

    def prefill(self, tokens: int) -> Piece:
        """One call: a prompt of every data shard, each query with all keys of its budget."""
        flops = tokens * self.flops.text_token + tokens**2 * self.flops.text_pair
        memory = self.layers + self.head + tokens * self.token_bytes
        piece = Piece(1, (flops + self.flops.head_token) / self.tensor, memory / self.tensor)
        return self.summed(piece, tokens, Passes().sums)

    def decode(self, slots: int, window: int, cached: tuple[int, int, int]) -> Piece:
        """One token of every slot of a data shard: all weights, all prompt caches once, the window
        of every ring, and the logits. ``cached``: rows of prompts, samples of each, tokens."""
        rows, group, tokens = cached
        pairs = slots * window + rows * group * tokens
        flops = slots * (self.flops.text_token + self.flops.head_token)
        flops += pairs * self.flops.text_pair
        memory = self.layers + self.head + slots * self.vocabulary * DRAW_BYTES
        caches = (rows * tokens + slots * window) * self.cache_bytes
        piece = Piece(1, flops / self.tensor, memory / self.tensor + caches)
        return self.summed(piece, slots, Passes().sums)

    def vision(self, rows: int, patches: int, window: int, passes: float = 1) -> Piece:
        """One call: the tower over all rows, every patch slot of a row with every other."""
        slots = rows * patches
        flops = self.flops.vision(slots, slots * window, slots * patches)
        parts = self.shards * self.tensor
        weights = 2 * (rows / self.shards) * self.tower / self.tensor
        memory = slots * self.patch_bytes / parts + weights
        piece = Piece(1, passes * flops / parts, passes * memory)
        return self.exchanged(piece, passes * self.tower / self.tensor)


def _size(shapes: Mapping[str, Any], prefix: str) -> int:
    """Entries of the matrices whose paths begin with ``prefix``."""
    return sum(math.prod(shape) for shape in _kernels(shapes, prefix))


def _in_and_out(shapes: Mapping[str, Any], prefix: str, width: int) -> float:
    """Entries that go in and come out of a token's products in all layers; one side of each matrix
    [L, ...] is ``width``."""
    stacks = ((shape[0], math.prod(shape[1:])) for shape in _kernels(shapes, prefix))
    return sum(layers * (width + entries / width) for layers, entries in stacks)


def _kernels(shapes: Mapping[str, Any], prefix: str) -> list[tuple[int, ...]]:
    return [x.shape for path, x in shapes.items() if path.startswith(prefix) and "/kernel" in path]
