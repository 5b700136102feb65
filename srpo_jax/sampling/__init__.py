"""The sampler: prefill once per prompt, decode in jitted segments."""
