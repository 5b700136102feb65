"""Benchmarks: their official scoring rules, tables, and the project's own grading beside them."""
