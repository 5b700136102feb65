"""The embedded demo: a small visual task, its tokenizer, and both SRPO stages on a CPU."""
