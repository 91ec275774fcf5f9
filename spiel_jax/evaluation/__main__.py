"""lm-eval's own command line, with the models of this library among its models.

    python -m spiel_jax.evaluation run --model spiel_jax --model_args checkpoint=runs/smollm2 --tasks gsm8k

Releases of lm-eval that read entry points know them without this.
"""

from lm_eval.__main__ import cli_evaluate

from spiel_jax.evaluation import lm  # noqa: F401  (registers)

if __name__ == "__main__":
    cli_evaluate()
