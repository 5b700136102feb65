"""Records, image and text processing, and the Grain pipeline."""
