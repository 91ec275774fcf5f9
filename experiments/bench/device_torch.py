"""Steps of Hugging Face PEFT's LoRA on torch, at the same shapes."""

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from experiments.bench.device_steps import shape_of
from experiments.bench.hardware import settings_that_fit
from experiments.bench.torch_worker import LINEARS, random_llama

GIB = 2**30


def steps(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measures with the first setting that fits, as ``device_steps.steps`` does.

    Gradients are checkpointed (as ``remat="full"``) where storing all for the backward pass does not fit.
    """
    if not torch.cuda.is_available() and not job["tiny"]:
        raise RuntimeError("torch sees no CUDA device")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 4 * GIB
    shape = shape_of(job)
    torch.manual_seed(0)
    with device:
        model = random_llama(shape, torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters())
    settings = settings_that_fit(shape, 3 * weights, usable, job["length"], job["rows"], scores=False)
    settings = [one for one in settings if one[1] != "dots"][job["skip"] :]
    rows, remat = settings[0]
    yield {"parameters": weights, "rows": rows, "length": job["length"], "remat": remat}
    config = LoraConfig(r=job["rank"], lora_alpha=16, lora_dropout=0.1, target_modules=LINEARS)
    model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    model.train()
    if remat == "full":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    yield {"tunable": sum(p.numel() for p in trained)}
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, shape.vocab_size, (rows, job["length"] + 1), device=device)

    def run(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # waits
        return (time.perf_counter() - began) / times

    try:
        run(2)
        together = max(1, min(20, round(1 / run(1))))
        seconds = [run(together) for _ in range(3)]
    except torch.cuda.OutOfMemoryError as error:
        if len(settings) == 1:
            raise
        yield {"did_not_fit": {f"{rows} sequences, {remat}": str(error)[:300]}, "again": job["skip"] + 1}
        return
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    yield {
        "seconds": {"ordinary": median(seconds)},
        "amortised": median(seconds),
        "tokens_per_second": rows * job["length"] / median(seconds),
        "peak_gib": peak,
    }
