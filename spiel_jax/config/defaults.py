"""Every key of a run's configuration with its default."""

from typing import Any

import ml_collections
from ml_collections import config_dict

Config = Any
"""An ``ml_collections.ConfigDict``; its keys are known at run time only."""

LINEAR_LAYERS = (r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj\.weight",)
"""Default rules: every linear layer inside the transformer blocks."""


def default_config() -> Config:
    """All keys. The defaults are the paper's recipe where it has one; a config sets model and data.

    But for spiel.seeds: what the paper has there was measured to cost more than evolving gains.
    What each may be is in ``bounds.KEYS``. No key can be added.

    Example:
        >>> config = default_config()
        >>> config.optimizer.learning_rate = 3e-4
        >>> config.is_locked
        True
    """
    optional = config_dict.placeholder  # one call per key: a placeholder object is one value
    config = ml_collections.ConfigDict(
        {
            "seed": 0,  # of the initial positions, the order of the data, random weights
            # spiel_ag | spiel_ma: entries evolve by accumulated gradients, by approximated moments
            # spiel_ma_adam: as spiel_ma, trained by Adam, whose second moments rows and columns seed
            # random: a static random mask (SHiRA, SpaRTA); with spiel.rate=0.2 it evolves at random (SET)
            # magnitude: static, largest or smallest pretrained weights (Super-Tuning)
            # lift: largest entries of a low-rank approximation of the weight, every spiel.every steps (LIFT)
            # structured: static, whole rows, columns or rectangles (S2FT)
            # smt: static, the rectangles of largest gradients in the first spiel.accumulation steps (SMT)
            # gradient: static, largest gradients at the start (SIFT); the entries are chosen at the end of
            # step spiel.accumulation
            # gem, talos: as gradient, the largest relative to the weight (GEM), the least sensitive (TaLoS)
            # wanda: as gradient, the largest weights times the size of their inputs (Super-Tuning)
            # migu: as gradient, the rows of largest output (MIGU)
            # lora: matrices of low rank beside the weights; ia3: scaled keys, values and MLP activations
            # full: AdamW on every weight
            # rosa: deltas and matrices of low rank on the same weights (RoSA)
            "method": "spiel_ag",
            "model": {
                # a folder with safetensors, a .gguf file, package:NAME, a hub id (org/name, org/name/folder,
                # org/name@revision), or random
                "source": "",
                "preset": optional(str),  # shape of a random model, such as llama2_7b
                # another place to take the tokenizer from: a folder with its files, a .gguf file,
                # package:NAME, a hub id; no weights need be there
                "tokenizer": optional(str),
                "dtype": "bfloat16",  # of the base weights: bfloat16 | float32
                # how the frozen weights of the blocks' linears are held: none (arrays), nf4 (4 bits, as in
                # QLoRA), fp4, int8 (as in LLM.int8()). A model that is quantised so already keeps its codes
                "quantization": "none",
                "requantize": False,  # whether what is quantised otherwise may be quantised once more
                "remat": "full",  # stored for the backward pass: none | dots | full
                # what computes attention in training: xla | cudnn, on NVIDIA GPUs in 16 bits: one kernel that
                # stores no number for each pair of tokens
                "attention": "xla",
                "loss_chunk": 512,  # tokens whose logits are in memory at a time
            },
            "targets": {
                "rules": LINEAR_LAYERS,  # regular expressions on names, first match wins; of adapters too
                "density": optional(float),  # of sparse methods: tunable entries as a share of all parameters
                "num_tunable": optional(int),  # or their number
                # slots of each matrix beside its share of that, as a share of it. More than 0: the budget is
                # one of all matrices, and moves to where scores are largest (spiel_ag, spiel_ma,
                # spiel_ma_adam, gradient, gem, talos, and random where it evolves)
                "spare": 0.0,
                # blocks of each weight along the mesh axes, each with its own share of the entries; a run's
                # mesh must divide them. Default: as the mesh at the start; 1 and 1 is the paper's algorithm
                "grid": {"fsdp": optional(int), "tensor": optional(int)},
                # balanced sets: each part of so many rows and columns of a weight (None: all) has as many
                # entries as the others, always. rows=1: every row; 32 and 32: every square of that size
                "balance": {"rows": optional(int), "columns": optional(int)},
            },
            # what a new run starts from
            "init_from": {
                # folder of an adapter, ours or another program's. A sparse run has its entries: their number
                # in each matrix too, and rules, density and num_tunable are not read; by default its first
                # reselection is no other than the rest. LoRA and (IA)^3 continue their own kind
                "adapter": optional(str),
                "what": "entries",  # of a sparse one: entries (positions and values) | positions
                "any_base": False,  # take it even if it is of another base model
            },
            # devices along each axis; -1: the rest of them
            "mesh": {
                "data": -1,  # each has its own sequences and all weights
                "fsdp": 1,  # its own sequences and a part of the weights
                "tensor": 1,  # the same sequences and a part of every layer's heads and hidden units
            },
            "spiel": {
                "every": 20,  # steps between reselections
                "accumulation": 5,  # steps of the estimation phase before one
                "schedule": "linear",  # of the replacement rate: linear | cosine | constant
                # initial replacement rate; default: 0.2, and 0 for random, whose entries then stay
                "rate": optional(float),
                # rate of the first reselection; negative: as the schedule says; default: 1 for SpIEL, whose
                # entries start at random, and as the schedule says for random
                "first": optional(float),
                # spiel_ag, gradient, gem, talos: candidates per active entry. Of a mask that is chosen once
                # (gradient, gem, talos) a phase's first step decides with 1, and all of it with more, as 4
                "candidate_ratio": 1.0,
                # spiel_ag, gradient: what proposes them: first, a step's first micro-batch; mean, all,
                # about the largest entries of their mean gradient, for a second pass of that step
                "candidates": "first",
                # spiel_ag: what a grown entry begins with of the gradients it was chosen by: Adam's second
                # moment, for small first steps; both, as in the paper; neither. Default: second, and both
                # with parity=reference
                "seeds": optional(str),
                # what is dropped: the smallest values; relative to the steps they were trained: age; to the
                # weight: weight
                "drop_by": "value",
                "score": "product",  # of spiel_ma: of a row's and a column's accumulator: product | minimum
                "magnitude": "largest",  # magnitude: largest | smallest
                # structured, smt: what is taken whole, so many rows and columns (None: all); structured: by
                # what: random | weights, the largest mean
                "tile": {"rows": optional(int), "columns": optional(int), "by": "random"},
                "filter_rank": 128,  # lift: of the approximation in which the largest entries are looked for
                # of a pruned base: entries are chosen where the weight is not zero, so that every zero stays
                "keep_zeros": False,
                "merge": "resident",  # resident | per_use
                # of the deltas: float32 | bfloat16, as in the paper's runs on a quantised base. Gradients and
                # the optimizer's statistics are float32
                "delta_dtype": "float32",
                # corrected | reference: every quirk of the original implementation
                "parity": "corrected",
            },
            "lora": {
                "rank": 64,
                "alpha": 16.0,
                "dropout": 0.1,
                "rslora": False,  # scale by alpha / sqrt(rank), not alpha / rank
            },
            # rosa: the budget of the deltas is that of targets, the other lora.rank
            "rosa": {
                "entries": "gradient",  # what chooses the deltas' entries: any method that has deltas alone
                "warmup": 64,  # steps in which the matrices of low rank train alone
                "learning_rate": optional(float),  # of these matrices; default: optimizer.learning_rate
            },
            "optimizer": {
                # The paper tries, with AdamW for all but spiel_ma: spiel_ag and lora 1e-4, 3e-5, 1e-5, 3e-6;
                # spiel_ma 2e-3, 1e-3, 7e-4, 4e-4; ia3 from 3e-4 to 1e-5
                "learning_rate": 1e-4,
                "schedule": "linear",  # after the warm-up: linear | cosine | constant
                "warmup": 0.03,  # share of the steps
                "weight_decay": 0.0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": optional(float),  # default: the method's
                "clip_norm": optional(float),
            },
            "data": {
                # tuple of paths, package:NAME, hub ids; or dicts of the fields of SourceSpec
                "sources": (),
                # a share below 1, a number of examples, or a tuple of sources
                "heldout": config_dict.FieldReference(0.02, field_type=object),
                "sequence_length": 2048,
                "packing": True,
                "truncate": "end",  # end | skip
                "on_malformed": "error",  # error | skip
                # a file with another chat template (Jinja) than the tokenizer's; the run keeps its text
                "chat_template": optional(str),
                # generation asks otherwise than an example teaches, or it teaches no stop: warn | error
                "on_mismatch": "warn",
                "style": "auto",  # of prompt/completion rows: chat | plain | auto
            },
            "batch_size": 128,  # sequences per optimizer step
            "micro_batch_size": optional(int),  # of these at a time; default: all
            "epochs": 2,
            "steps": optional(int),  # instead of epochs
            "eval_every": 50,  # steps between evaluations of the held-out loss; 0: only at the ends
            "eval_batches": optional(int),  # at most so many held-out batches; default: all
            "log_every": 1,
            "checkpoint_every": 100,  # 0: only at the end
            "checkpoint_keep": 2,  # the newest
            # the one of lowest held-out loss beside them: an evaluation that is the best so far is saved
            "checkpoint_keep_best": False,
            # trace so many steps, from the third of this process on, into the run's folder "profile": XProf,
            # TensorBoard or ui.perfetto.dev show it
            "profile": 0,
            "on_nonfinite": "stop",  # a loss or gradient that is not finite: stop | skip that step
            # metrics.jsonl or TensorBoard cannot be written: continue | stop, with a checkpoint
            "on_record_failure": "continue",
            "skip_limit": 10,  # so many steps in a row are skipped, and not one more
            "sample": {
                "prompt": optional(str),  # shown to the base and the tuned model at the end
                "max_new_tokens": 64,
                # tuple of prompts whose replies are recorded (samples.jsonl, TensorBoard) at each evaluation
                "prompts": (),
            },
            # benchmarks whose scores are recorded beside the held-out loss; needs spiel_jax[eval]
            "eval_tasks": {
                "names": (),  # tuple of lm-eval's tasks; with data_dir mmlu, gsm8k, bbh, tydiqa: local files
                "every": 0,  # steps between; 0: only at the end
                "limit": 50,  # documents of each
                "data_dir": optional(str),
                "max_new_tokens": optional(int),  # of a continuation; default: the task's
            },
        }
    )
    return config.lock()
