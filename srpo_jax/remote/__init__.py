"""Models behind an OpenAI-compatible server: limits, single requests, batches."""
