"""A tokenizer small enough to work out by hand: every byte is a token, and the special ones."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ADDED = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture
def make_tokenizer():
    def make(template=None, *, bos=False, **special):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        if bos:
            from tokenizers.processors import TemplateProcessing

            backend.add_special_tokens(["<s>"])
            backend.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
            )
        special = special or SPECIAL
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def chatml(make_tokenizer):
    return make_tokenizer(CHATML)


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows to a JSON lines file; a string is a line as it is."""

    def write(rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        file = tmp_path / name
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(file)

    return write
