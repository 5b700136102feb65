"""SRPO in JAX: reflection SFT and reflection-aware GRPO for Qwen2.5-VL."""
