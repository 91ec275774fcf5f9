"""Evaluation: benchmarks by the harness that everyone uses (lm-eval), and what a fine-tune forgets."""
