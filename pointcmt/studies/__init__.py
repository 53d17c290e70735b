"""What is made of many runs: ablations, robustness, comparisons, reports, and the demo."""
