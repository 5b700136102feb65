"""The study of methods on drawn tasks."""
