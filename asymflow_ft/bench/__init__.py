"""Measurements of speed and memory, with random weights and without a download; docs/performance.md has results."""
