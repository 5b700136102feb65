"""The study of methods at equal compute: ``python -m tools.study``."""
