"""MLX: a folder that mlx-lm loads.

A quantized module NAME is, in model.safetensors,
    NAME.weight  uint32 [rows, cols bits / 32]: codes from 0, one dense little-endian bit stream
    NAME.scales  [rows, groups]; uint8 E8M0 in mode mxfp4
    NAME.biases  [rows, groups], not in mode mxfp4
with w' = scale q + bias in mode affine, so our zero point z becomes the bias -z s. config.json has the
commonest precision and every module by name: `quantization: {group_size, bits, mode, NAME: {...}}`
(mlx-lm 0.32, utils.load_model; mlx 0.32, mx.dequantize). Scales are in the model's own 16 bits, as
mlx-lm writes them: MLX computes in the widest type that takes part, and fp16 beside bfloat16 is fp32.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer import untrusted
from optimizer.errors import PlanError
from optimizer.formats import rules
from optimizer.formats.rules import Demands, Verdict
from optimizer.formats.safetensors import checkpoint, read_back
from optimizer.formats.safetensors.checkpoint import FILE, module, unstream, words
from optimizer.plan import Inventory, Layer, Plan, Precision

if TYPE_CHECKING:
    from torch import Tensor

SCALES = {"F16": "F16", "BF16": "BF16", "F32": "F16"}  # dtype of the model -> of scales and biases
GROUPS = (32, 64, 128)
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1
# Mean KL in nats to the plan's logits. Biases in fp16 move weights by a part of 4096 of themselves:
# 3e-5 on SmolLM2, asymmetric at 3 to 8 bits. A layer at a wrong width or scale is 1e-3 and more.
ALLOWED = 2e-4
APPLE = "MLX runs on Apple silicon; on other machines with the package mlx-cpu, slowly."


def holds(layer: Layer, precision: Precision) -> str | None:
    """None, or why MLX can't hold the layer."""
    if layer.kind not in ("linear", "embedding", "head"):
        return f"it takes Linear layers and embeddings as they are named, and this is {layer.kind}"
    if precision.kind == "int" and precision.group_size not in GROUPS:
        return f"its groups have {', '.join(map(str, GROUPS))} weights, not {precision.name}"
    return None


def check(plan: Plan, inventory: Inventory, demands: Demands) -> Verdict:
    name, errors = demands.profile.name, demands.errors(plan, inventory)
    used = sorted({plan.choice[layer.name] for layer in rules.quantized(plan, inventory)})
    if errors:
        return Verdict(name, tuple(errors))
    notes = [APPLE]
    if inventory.dtype == "BF16" and any(p.kind == "int" for p in used):
        notes.append(
            "The model is bfloat16, and so are MLX's scales: they keep 8 of the plan's 11 bits, which "
            "moves weights by up to 0.8 % of a layer's largest."
        )
    stored = {p.name: f"{_scheme(p)['mode']}, {p.bits} bits" for p in used}
    size = checkpoint.size(plan, inventory, lambda x, p: _sizes(x, p, SCALES[inventory.dtype]))
    return Verdict(name, (), (*demands.notes, *notes), stored=stored, bytes=size)


def _scheme(precision: Precision) -> dict[str, Any]:
    mode = "mxfp4" if precision.kind == "mxfp4" else "affine"
    return {"group_size": precision.group_size, "bits": precision.bits, "mode": mode}


def _sizes(layer: Layer, precision: Precision, dtype: str) -> dict[str, tuple[str, list[int]]]:
    stem, groups = module(layer.name), [layer.rows, precision.groups(layer.cols)]
    weight = ("U32", [layer.rows, layer.cols * precision.bits // 32])
    if precision.kind == "mxfp4":
        return {f"{stem}.weight": weight, f"{stem}.scales": ("U8", groups)}
    return {
        f"{stem}.weight": weight,
        f"{stem}.scales": (dtype, groups),
        f"{stem}.biases": (dtype, groups),
    }


def config(plan: Plan, inventory: Inventory) -> dict[str, Any]:
    """The `quantization` of config.json; empty where nothing is quantized."""
    layers = rules.quantized(plan, inventory)
    if not layers:
        return {}
    counts = Counter(dict.fromkeys(sorted({plan.choice[x.name] for x in layers}), 0))
    for layer in layers:
        counts[plan.choice[layer.name]] += layer.weights
    found = _scheme(counts.most_common(1)[0][0])
    return found | {module(x.name): _scheme(plan.choice[x.name]) for x in layers}


def write(
    plan: Plan, inventory: Inventory, packed: Mapping[str, Tensor], folder: Path, out: Path
) -> None:
    """packed: the plan's stored tensors. folder: what to copy beside the weights."""

    def make(layer: Layer, precision: Precision) -> dict[str, Tensor]:
        return _tensors(layer, precision, packed, SCALES[inventory.dtype])

    quantization = config(plan, inventory)
    checkpoint.write(plan, inventory, packed, make, quantization, folder, out)
    settings = untrusted.read(out / "config.json", "keep")
    settings["quantization"] = quantization
    settings |= {key: value for key, value in rope(settings).items() if key not in settings}
    if not quantization:
        del settings["quantization"], settings["quantization_config"]
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 5 says of positions in `rope_parameters`, in the words of before that most
    models of mlx-lm read: without them, it takes 10000 for every model's rope_theta."""
    given = settings.get("rope_parameters")
    if not isinstance(given, dict):
        return {}
    if "rope_theta" not in given:  # by kind of attention, as in Gemma 3
        whole, local = given.get("full_attention"), given.get("sliding_attention")
        found = rope({"rope_parameters": whole})
        if isinstance(local, dict) and "rope_theta" in local:
            found["rope_local_base_freq"] = local["rope_theta"]
        return found
    found = {"rope_theta": given["rope_theta"]}
    if given.get("rope_type", "default") != "default":
        found["rope_scaling"] = {k: v for k, v in given.items() if k != "rope_theta"}
    return found


def _tensors(
    layer: Layer, precision: Precision, packed: Mapping[str, Tensor], dtype: str
) -> dict[str, Tensor]:
    import torch

    from optimizer.quantization.uniform import unpack

    stem, scales = module(layer.name), packed[f"{layer.name}.scales"]
    found = {f"{stem}.weight": words(packed[f"{layer.name}.codes"]).view(torch.uint32)}
    if precision.kind == "mxfp4":
        return found | {f"{stem}.scales": scales}
    zeros: Any = 2.0 ** (precision.bits - 1)
    if not precision.symmetric:
        stored = packed[f"{layer.name}.zeros"]
        zeros = unpack(stored, precision, precision.groups(layer.cols)).float()
    kept = torch.bfloat16 if dtype == "BF16" else torch.float16
    own = scales.to(kept)
    return found | {f"{stem}.scales": own, f"{stem}.biases": (-zeros * own.float()).to(kept)}


def decode(folder: Path, plan: Plan, inventory: Inventory) -> dict[str, Tensor]:
    """What the file says, by its own config: layer -> W' [rows, cols] fp32. Raises PlanError."""
    import torch
    from safetensors import safe_open

    given = untrusted.read(folder / "config.json", "keep").get("quantization", {})
    found = {}
    with safe_open(folder / FILE, framework="pt") as file:
        for layer in rules.quantized(plan, inventory):
            stem = module(layer.name)
            scheme = given.get(stem, given)
            stored = file.get_tensor(f"{stem}.weight").view(torch.int32)
            scales = file.get_tensor(f"{stem}.scales").float()
            size, bits = int(scheme["group_size"]), int(scheme["bits"])
            codes = unstream(stored, bits, size * scales.shape[1])
            if scheme["mode"] == "mxfp4":
                table = torch.tensor([*MAGNITUDES, *(-x for x in MAGNITUDES)])
                step = torch.exp2(scales - 127).repeat_interleave(size, 1)
                found[layer.name] = table[codes] * step
                continue
            biases = file.get_tensor(f"{stem}.biases").float()
            step, low = (x.repeat_interleave(size, 1) for x in (scales, biases))
            found[layer.name] = codes.float() * step + low
    return found


# ---------------------------------------------------------------- read back by mlx-lm


def by_mlx(folder: Path, wanted: Tensor, halves: bool) -> str:
    """Who read the folder. wanted: log-probabilities [tokens, vocabulary] of the plan's own weights on
    `read_back.window`. halves: scales lost bits to bfloat16. Raises PlanError where mlx-lm computes
    others, or doesn't load the folder."""
    reader = f"mlx-lm {version('mlx-lm')}"
    try:
        found = _log_probabilities(folder, wanted.shape[-1])
    except Exception as error:  # noqa: BLE001  whatever a foreign loader raises is the same answer
        raise PlanError(
            f"{reader} doesn't load what was written for it ({type(error).__name__}: {error}). "
            "Nothing was kept; export to=torch, which holds every plan."
        ) from None
    off = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    if not off <= (read_back.ALLOWED_HALVES if halves else ALLOWED):
        raise PlanError(
            f"Read back by {reader}, the folder isn't the plan's model: it has a KL of {off:.3g} nats "
            "to it. Nothing was kept; export to=torch, which holds every plan."
        )
    tokens = read_back.WINDOW
    return f"{reader}: the plan's logits on {tokens} tokens, KL {max(off, 0.0):.1g} nats"


def _log_probabilities(folder: Path, vocabulary: int) -> Tensor:
    """[tokens, vocabulary] fp64, computed in fp32 on the CPU."""
    import mlx.core as mx
    import numpy as np
    import torch
    from mlx_lm.utils import load_model

    with contextlib.redirect_stdout(io.StringIO()), mx.stream(mx.cpu):
        net, _ = load_model(folder)
        net.set_dtype(mx.float32)
        ids = mx.array(read_back.window(vocabulary).numpy())
        logits = np.array(net(ids)[0].astype(mx.float32))
    return torch.log_softmax(torch.from_numpy(logits).double(), -1)
