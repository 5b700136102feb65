"""Qwen2.5-VL in Flax NNX, with Hugging Face checkpoints in and out."""
