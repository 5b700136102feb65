"""Run configurations (ml_collections)."""
