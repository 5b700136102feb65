"""Command-line programs around the package."""

import srpo_jax as srpo_jax  # first of all: it sees to Ctrl-C while the rest is imported
