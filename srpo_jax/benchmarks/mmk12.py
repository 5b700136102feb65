"""MMK12 (ModalMinds/MM-EUREKA): its only official scoring is a language model's judgement."""

from srpo_jax.benchmarks import common

BENCHMARK = common.Benchmark(
    name="mmk12",
    counts={2000: "test"},
    form=common.Form("question answer image|images", images=("image", "images")),
    places={"test": common.Place("FanqingM/MMK12", "test")},
    groups=common.grouping("subject"),
    official=None,
)
