"""Resident memory of a packed model with a filled cache, against what optimizer.memory predicts.

    python measure.py PACKED_FOLDER CONTEXT [BATCH] [DTYPE] [DEVICE]  ->  one line per stage, CSV

Each stage is read from the operating system (CPU) or the allocator and the driver (CUDA) after it
happened; `peak` is the most that was ever resident. Run it in a fresh process per setting.
"""

import gc
import sys
from pathlib import Path


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def reader(device: str):
    """() -> (bytes now, most so far)."""
    if device == "cpu":
        return lambda: (resident("VmRSS"), resident("VmHWM"))
    import torch

    def on_gpu():
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()  # the context, and other programs
        return outside + torch.cuda.memory_allocated(), outside + torch.cuda.max_memory_reserved()

    return on_gpu


def main() -> None:
    folder, context = Path(sys.argv[1]), int(sys.argv[2])
    batch = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    dtype = sys.argv[4] if len(sys.argv) > 4 else "float32"
    device = sys.argv[5] if len(sys.argv) > 5 else "cpu"
    import torch
    import transformers

    from optimizer import memory
    from optimizer.backends import packed
    from optimizer.plan import Budget, Plan

    _ = transformers.AutoModelForCausalLM  # what loading a model imports
    if device != "cpu":
        torch.zeros(1, device=device)
    read = reader(device)
    gc.collect()
    start = read()[0]
    plan = Plan.load(folder)
    net = packed.load(folder, dtype=getattr(torch, dtype), device=device)
    gc.collect()
    loaded = read()[0]
    cache = transformers.DynamicCache(config=net.config)
    ids = torch.zeros((batch, context), dtype=torch.long, device=device)
    with torch.inference_mode():
        for i in range(0, context, memory.ENGINES["torch"].prefill):
            step = ids[:, i : i + memory.ENGINES["torch"].prefill]
            net(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
    gc.collect()
    filled, peak = read()

    bits = torch.finfo(getattr(torch, dtype)).bits
    shape = memory.geometry(net.config.to_dict())
    machine = "cpu" if device == "cpu" else "gpu"
    budget = Budget(memory="1TB", context=context, batch=batch, kv=bits, machine=machine)
    weights = memory.resident_weights(plan, bits)
    largest = memory.largest_packed(plan)
    need = memory.use(shape, "torch", budget, weights, largest, bits)
    rows = [
        ("runtime", need.runtime, start),
        ("weights", need.weights, loaded - start),
        ("cache", need.cache, filled - loaded),
        ("activations", need.activations, peak - filled),
        ("total", need.total, peak),
    ]
    print("context,batch,dtype,device,line,predicted,measured,error_percent")
    for line, predicted, measured in rows:
        error = 100 * (predicted - measured) / max(measured, 1)
        print(f"{context},{batch},{dtype},{device},{line},{predicted},{measured},{error:.1f}")


if __name__ == "__main__":
    main()
