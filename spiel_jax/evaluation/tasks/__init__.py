"""The paper's benchmarks as lm-eval tasks over local files; docs/howto/evaluate.md says what lies where."""
