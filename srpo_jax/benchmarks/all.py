"""The benchmarks by name, in the order in which messages list them.

A further one is a module with its ``BENCHMARK``, named here.
"""

from srpo_jax.benchmarks import (
    emma,
    mathverse,
    mathvision,
    mathvista,
    mmk12,
    mmmu,
    mmmu_pro,
    olympiadbench,
    wemath,
)

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (
        mathvista, mathvision, mathverse, mmmu_pro, mmmu, emma, olympiadbench, wemath, mmk12,
    )
}  # fmt: skip
