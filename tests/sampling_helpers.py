"""Probabilities, which of them a truncation keeps, and whether draws follow them."""

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def assert_frequencies(tokens: np.ndarray, p: np.ndarray) -> None:
    """Every count within 5 standard deviations and 3, and nothing of probability 0 at all."""
    n = len(tokens)
    counts = np.bincount(tokens, minlength=len(p))
    assert counts[p == 0].sum() == 0
    bound = 5 * np.sqrt(n * p * (1 - p)) + 3
    assert (np.abs(counts - n * p) <= bound).all(), (counts - n * p) / bound


def reference_truncation(row: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens are kept, by sorting; rows have no equal values."""
    order = np.argsort(-row)
    p = softmax(row)
    kept = np.zeros(len(row), bool)
    kept[order[: top_k or len(row)]] = True
    if top_p < 1:
        q = np.where(kept, p, 0) / p[kept].sum()
        before = np.cumsum(q[order]) - q[order]
        kept[order[before >= top_p]] = False
    if min_p > 0:
        kept &= p >= min_p * p.max()
    return kept
