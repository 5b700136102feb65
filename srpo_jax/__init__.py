"""SRPO in JAX: reflection SFT and reflection-aware GRPO for Qwen2.5-VL on TPU and GPU."""

__version__ = "0.1.0"
