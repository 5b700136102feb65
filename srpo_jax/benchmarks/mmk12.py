"""MMK12 (ModalMinds/MM-EUREKA): its only official scoring is a language model's judgement."""

from srpo_jax.benchmarks.common import Benchmark, Form, Place, grouping

BENCHMARK = Benchmark(
    name="mmk12",
    counts={2000: "test"},
    form=Form("question answer image|images", images=("image", "images")),
    places={"test": Place("FanqingM/MMK12", "test")},
    groups=grouping("subject"),
    official=None,
)
