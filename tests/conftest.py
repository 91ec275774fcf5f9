"""Test-wide settings, and a model, a tokenizer and data small enough to work out by hand."""

import atexit
import gc
import json
import os
import platform
import shutil
import tempfile
import threading
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compiling is most of what the tests do. Of the compiler's two ways to write code for a CPU the older takes
# half the time, a quarter without optimisations. (For programs that a test reads see support/programs.py.)
# A program is not split into 32 modules for so many threads: in one piece it takes a fifth less of the CPU.
# Without fused products and sums (AVX has none), what is written the same is rounded the same in all
# programs, and on all x86 CPUs. What is given comes last and wins.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_max_isa=AVX" if platform.machine() in ("x86_64", "AMD64") else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # they are not read, and an eighth of lowering
# Many tests run the same programs: compile each once.
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers share the controller's
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="spiel_jax_test_cache_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from jax._src.interpreters import mlir

# Tracing and compiling collect garbage often, and what was imported (440,000 objects) is none.
gc.collect()
gc.freeze()
gc.set_threshold(50_000)

# Each program is lowered in a context of its own, and to load MLIR's dialects into one is a third of what a
# small program costs: a hundred of a thread share one. (It keeps constants, so that it is not kept for ever.)
new_context, shared = mlir.make_ir_context, threading.local()


def shared_context():
    if getattr(shared, "left", 0) == 0:
        shared.context, shared.left = new_context(), 100
    shared.left -= 1
    return shared.context


mlir.make_ir_context = shared_context  # private: without it tests are slower, and the same

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ADDED = ["<|im_start|>", "<|im_end|>"]


def make_byte_tokenizer(template=None, *, bos=False, **special):
    # Here, since pytest's own process and tests/device can do without.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.add_special_tokens(["<s>"])
        backend.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    special = special or SPECIAL
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module_are_let_go():
    """A process can have 65,530 mappings of memory, and every compiled program takes some of them.

    Until there are many, modules share what they trace and compile.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.is_file() or maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def make_tokenizer():
    return make_byte_tokenizer


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


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A folder with a random tiny Llama and a byte-level tokenizer with ChatML as its template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_byte_tokenizer(CHATML).save_pretrained(folder)
    return folder
