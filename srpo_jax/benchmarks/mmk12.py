"""MMK12 (ModalMinds/MM-EUREKA): its only official scoring is a language model's judgement."""

from srpo_jax.benchmarks.common import grouping

NAME = "mmk12"
COUNTS = {2000: "test"}
NO_RULE = "MMK12 is judged by a language model and has no official rule: use --mode strict"

groups = grouping("subject")
official = None
