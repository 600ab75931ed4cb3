"""Resident memory of a packed model with a filled cache, against what
optimizer.hardware.memory predicts.

    python measure.py PACKED_FOLDER CONTEXT [BATCH] [DTYPE] [DEVICE] [CACHE_BITS]

prints one line per stage, CSV.

Each stage is read from the operating system (CPU) or the allocator and the driver (CUDA) after it
happened; `peak` is the most that was ever resident. Run it in a fresh process per setting.
"""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def reader(device: str) -> Callable[[], tuple[int, int]]:
    """() -> (bytes now, most so far)."""
    if device == "cpu":
        return lambda: (resident("VmRSS"), resident("VmHWM"))
    import torch

    def on_gpu() -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()  # the context, and other programs
        return outside + torch.cuda.memory_allocated(), outside + torch.cuda.max_memory_reserved()

    return on_gpu


def forget_the_most() -> None:
    """VmHWM counts from here on (Linux; what loading needed is a line of its own)."""
    Path("/proc/self/clear_refs").write_text("5")


def tidy() -> None:
    """What Python and the allocator no longer need goes back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def warm_up(folder: Path, device: str) -> None:
    """Load and run a tiny model of the same architecture: what the libraries import and allocate
    at their first use belongs to the runtime, not to the weights."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    config.update({"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    net = transformers.AutoModelForCausalLM.from_config(config).to(device).eval()
    with torch.inference_mode():
        net(input_ids=torch.zeros((1, 8), dtype=torch.long, device=device), use_cache=True)


def main() -> None:
    folder, context = Path(sys.argv[1]), int(sys.argv[2])
    batch = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    dtype = sys.argv[4] if len(sys.argv) > 4 else "float32"
    device = sys.argv[5] if len(sys.argv) > 5 else "cpu"
    import torch
    import transformers

    from optimizer.formats.torch import packed
    from optimizer.hardware import memory
    from optimizer.hardware.geometry import geometry
    from optimizer.models.kv_cache import Cache
    from optimizer.plan import Budget, Plan

    bits = torch.finfo(getattr(torch, dtype)).bits
    kv = int(sys.argv[6]) if len(sys.argv) > 6 else bits
    warm_up(folder, device)
    read = reader(device)
    tidy()
    start = read()[0]
    plan = Plan.load(folder)
    net = packed.load(folder, dtype=getattr(torch, dtype), device=device, steady=True)
    while_loading = read()[1]
    tidy()
    loaded = read()[0]
    if device == "cpu":
        forget_the_most()
    cache: Any = transformers.DynamicCache(config=net.config)
    if kv < 16:
        cache = Cache(net.config, memory.kind("torch", kv))
    ids = torch.zeros((batch, context), dtype=torch.long, device=device)
    with torch.inference_mode():
        for i in range(0, context, memory.ENGINES["torch"].prefill):
            step = ids[:, i : i + memory.ENGINES["torch"].prefill]
            net(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
    tidy()
    filled, peak = read()

    shape = geometry(net.config.to_dict())
    machine = "cpu" if device == "cpu" else "gpu"
    budget = Budget(memory="1TB", context=context, batch=batch, kv=kv, machine=machine)
    weights = memory.resident_weights(plan, bits)
    unpacked = memory.unpacked_bytes(plan)
    need = memory.use(shape, "torch", budget, weights, unpacked, bits)
    rows = [
        ("runtime", need.runtime, start),
        ("weights", need.weights, loaded - start),
        ("cache", need.cache, filled - loaded),
        ("activations", need.activations, peak - filled),
        ("running", need.total, peak),
        ("loading", need.runtime + need.weights, while_loading),
        ("total", need.total, max(peak, while_loading)),
    ]
    print("context,batch,dtype,device,cache_bits,line,predicted,measured,error_percent")
    for line, predicted, measured in rows:
        error = 100 * (predicted - measured) / max(measured, 1)
        print(f"{context},{batch},{dtype},{device},{kv},{line},{predicted},{measured},{error:.1f}")


if __name__ == "__main__":
    main()
