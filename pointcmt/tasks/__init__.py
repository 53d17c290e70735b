"""Tasks: the metrics of each, and which figure to watch."""
