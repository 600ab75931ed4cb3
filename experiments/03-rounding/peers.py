"""Another tool's rounding of a model, for measure.py. Runs in an environment of its own (peers.sh).

peers.py TOOL FOLDER IDS.npy BITS GROUP OUT.safetensors      GROUP: -1 = one scale a row
TOOL: gptqmodel, gptqmodel-static (desc_act with static groups: our order of columns), autoround
(ITERS steps a block). IDS: calibration tokens [windows, length]. Asymmetric, one scale and one zero
point for GROUP weights, as ours. OUT: every rounded weight [rows, cols] as the tool decodes it, fp32;
its metadata has the seconds of rounding, loading and saving not counted.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

import numpy as np
import torch
from safetensors.torch import save_file

Found = tuple[dict[str, torch.Tensor], float]


def gptqmodel(folder: str, ids: np.ndarray, bits: int, group: int, static: bool) -> Found:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    order = {"desc_act": True, "static_groups": True} if static else {}
    if group < 0:  # one scale a row: there its act_group_aware, which needs groups, means the same
        order = {"desc_act": True, "act_group_aware": False}
    config = QuantizeConfig(bits=bits, group_size=group, sym=False, device="cpu", **order)
    model = GPTQModel.load(folder, config)
    windows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    begun = time.perf_counter()
    model.quantize(windows, batch_size=8)
    seconds = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as scratch:
        model.save(scratch)
        back = GPTQModel.load(scratch, device="cpu", backend=BACKEND.TORCH)
        net = back.model
        found = {
            f"{name}.weight": module.dequantize_weight().T.float().contiguous()
            for name, module in net.named_modules()
            if hasattr(module, "dequantize_weight")
        }
    return found, seconds


def autoround(folder: str, ids: np.ndarray, bits: int, group: int) -> Found:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = {name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    tool = AutoRound(
        net, AutoTokenizer.from_pretrained(folder), bits=bits, group_size=group, sym=False,
        iters=int(os.environ.get("ITERS", "200")), nsamples=len(ids), seqlen=ids.shape[1],
        dataset=[torch.from_numpy(row)[None] for row in ids], batch_size=8, device_map="cpu",
        amp=False, low_gpu_mem_usage=False,
    )  # fmt: skip
    begun = time.perf_counter()
    net, _ = tool.quantize()
    seconds = time.perf_counter() - begun
    found = {
        f"{name}.weight": net.get_submodule(name).weight.detach().float().contiguous()
        for name in own
        if name != "lm_head"
    }
    return found, seconds


def main(tool: str, folder: str, tokens: str, bits: str, group: str, out: str) -> None:
    ids = np.load(tokens)
    if tool.startswith("gptqmodel"):
        found, seconds = gptqmodel(folder, ids, int(bits), int(group), tool.endswith("static"))
    else:
        found, seconds = autoround(folder, ids, int(bits), int(group))
    print(tool, bits, len(found), "layers", f"{seconds:.1f} s", flush=True)
    save_file(found, out, metadata={"seconds": f"{seconds:.1f}", "tool": tool})


if __name__ == "__main__":
    main(*sys.argv[1:])
