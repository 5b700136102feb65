"""LaTeX answers as values, as the official verdicts read them."""
