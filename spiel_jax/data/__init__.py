"""Training data: rows of text to packed batches of tokens.

Example::

    data = load_data(DataConfig(sources=(SourceSpec("train.jsonl"),), heldout=0.05), tokenizer)
    for batch in data.train_iterator(batch_size=8, epochs=2): ...
    for batch in data.heldout_batches(batch_size=8): ...
"""

from spiel_jax.data.examples import SourceReport
from spiel_jax.data.pipeline import Batch, Data, DataConfig, Report, load_data
from spiel_jax.data.rows import DataError, EmptyDataset, MalformedRow
from spiel_jax.data.sources import SourceSpec
from spiel_jax.data.templates import ChatTemplate, chat_template

__all__ = [
    "Batch",
    "ChatTemplate",
    "Data",
    "DataConfig",
    "DataError",
    "EmptyDataset",
    "MalformedRow",
    "Report",
    "SourceReport",
    "SourceSpec",
    "chat_template",
    "load_data",
]
