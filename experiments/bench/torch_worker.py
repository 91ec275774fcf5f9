"""A process of the step benchmark: Hugging Face PEFT on torch, on the same shapes."""

import time
from collections.abc import Callable
from typing import Any

from experiments.bench.serve import serve

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_llama(shape: Any, dtype: Any) -> Any:
    """Transformers' Llama of the shape of a ``ModelConfig``, with random weights in this dtype."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_embeddings,
        use_cache=False,
    )
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def prepare(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str], float]]:
    """Facts of a method, and the function that runs and times a step."""
    import numpy as np

    from spiel_jax.errors import extra

    torch = extra("torch", "dev")
    extra("peft", "dev")
    from peft import LoraConfig, SupertuningConfig, get_peft_model

    from spiel_jax.models import ModelConfig, open_model

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    preset = getattr(ModelConfig, job["source"], None)
    shape = preset() if preset else open_model(job["source"]).config
    model = random_llama(shape, getattr(torch, job["dtype"]))
    options = job["options"]
    if job["method"] == "peft_lora":
        peft = LoraConfig(
            r=int(options.get("rank", 64)),
            lora_alpha=int(options.get("alpha", 16)),
            lora_dropout=float(options.get("dropout", 0.1)),
            target_modules=LINEARS,
        )
    else:
        peft = SupertuningConfig(target_modules=LINEARS, sparsity=1 - job["share"])
    model = get_peft_model(model, peft)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (job["batch"], job["length"] + 1))
    tokens = torch.from_numpy(tokens)

    def run(kind: str) -> float:
        began = time.perf_counter()
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    run("ordinary")
    state = [
        value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)
    ]
    facts = {
        "kinds": ["ordinary"],
        "compile_seconds": 0.0,
        "state_bytes": sum(t.numel() * t.element_size() for t in [*state, *trained]),
        "tunable": sum(p.numel() for p in trained),
    }
    return facts, run


if __name__ == "__main__":
    serve(prepare)
