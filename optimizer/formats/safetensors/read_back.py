"""An export read back by the code that will load it.

transformers' own loader computes a window of tokens, beside the packed model of the same plan; for
folders of vLLM, which needs a GPU, the compressed-tensors package unpacks every layer. Where a package
isn't installed or the model is too large for this machine, that is what is told.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import PlanError
from optimizer.formats.safetensors.checkpoint import FILE, module
from optimizer.models.inventory import architecture
from optimizer.models.source import quiet
from optimizer.plan import Inventory

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 32  # tokens
# Mean KL in nats. With the same weights in fp32 only the order of sums differs: logits move by 1e-4 of
# their spread at most, which is 1e-8 nats. A layer at a wrong width or scale is 1e-3 and more. Weights
# that a loader rounds to 16 bits are between the two, and a router's close choices make more of them
# (8e-4 in a random model of four experts).
ALLOWED, ALLOWED_HALVES = 1e-5, 1e-2
SEED = 0
# engine -> (import name, distribution) of what reads its folders, transformers itself aside
NEEDS = {
    "transformers": ("compressed_tensors", "compressed-tensors"),
    "autoround": ("auto_round", "auto-round"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "mlx": ("mlx_lm", "mlx-lm"),  # on Linux with mlx-cpu
}


def lacking(engine: str, inventory: Inventory) -> str | None:
    """Why nothing but our own code can read the engine's folder here; None if something can."""
    name, distribution = NEEDS[engine]
    if importlib.util.find_spec(name) is None:
        return (
            f"our own reader only, since {distribution} isn't installed here. To have the engine's "
            f"own loader read it, pip install {distribution} before exporting"
        )
    needed, free = 4 * sum(x.weights for x in inventory.layers), _free_memory()
    if free is not None and needed > free:
        return (
            f"our own reader only, layer by layer: in the engine's own loader the model takes "
            f"{needed / 1e9:.3g} GB in fp32, more than this machine has free"
        )
    return None


def _free_memory() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def by_transformers(engine: str, folder: Path, wanted: Tensor, halves: bool) -> str:
    """Who read the folder. wanted: log-probabilities [tokens, vocabulary] of the plan's own weights on
    `window`. halves: the loader unpacks quantized weights to 16 bits, or multiplies so. Raises
    PlanError where transformers computes others, or doesn't load the folder."""
    import torch

    distribution = NEEDS[engine][1]
    reader = f"transformers {version('transformers')} with {distribution} {version(distribution)}"
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            net, report = architecture(folder)[0].from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
            _unpack(net)
            _widen(net)
            found = log_probabilities(net.eval(), window(wanted.shape[-1]))
    except Exception as error:  # noqa: BLE001  whatever a foreign loader raises is the same answer
        raise PlanError(
            f"{reader} doesn't load what was written for it ({type(error).__name__}: {error}). "
            "Nothing was kept; export to=torch, which holds every plan."
        ) from None
    missing = sorted(report["missing_keys"])
    off = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    if missing or not off <= (ALLOWED_HALVES if halves else ALLOWED):
        what = f"finds no {missing[0]}" if missing else f"has a KL of {off:.3g} nats to it"
        raise PlanError(
            f"Read back by {reader}, the folder isn't the plan's model: it {what}. Nothing was kept; "
            "export to=torch, which holds every plan."
        )
    return f"{reader}: the plan's logits on {WINDOW} tokens, KL {max(off, 0.0):.1g} nats"


def _unpack(net: Any) -> None:
    """What compressed-tensors does when a model first runs, so that what it leaves in 16 bits (4-bit
    floats in bfloat16, exactly) can be widened."""
    if hasattr(net, "ct_decompress_hook"):
        net.hf_quantizer.compressor.decompress_model(net)


def _widen(net: Any) -> None:
    """fp32 for what transformers left in 16 bits although fp32 was asked for: experts that it merges
    from a quantized checkpoint keep the checkpoint's dtype, and are then multiplied in it. That rounds
    products (1e-5 nats, 2e-3 where a router's choice is close), which is no fault of the file."""
    for parameter in net.parameters():
        if parameter.dtype.is_floating_point and parameter.dtype.itemsize == 2:
            parameter.data = parameter.data.float()


def window(words: int) -> Tensor:
    """Token ids [1, WINDOW] of a vocabulary of so many words."""
    import torch

    rng = torch.Generator().manual_seed(SEED)
    return torch.randint(0, words, (1, WINDOW), generator=rng)


def log_probabilities(net: Any, ids: Tensor) -> Tensor:
    """[tokens, vocabulary] fp64: a sum over a vocabulary of fp32 logarithms is off by 1e-6 itself."""
    import torch

    with torch.inference_mode():
        logits = net(input_ids=ids, use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), -1)


def by_compressed_tensors(
    folder: Path, names: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> str:
    """Who read the folder. names: layer -> the plan's weights. settings: the quantization_config.
    Raises PlanError for a layer that the package unpacks to something else."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return (
            "our own reader only, since compressed-tensors isn't installed here. To have the package "
            "that vLLM uses read it, pip install compressed-tensors before exporting"
        )
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors import safe_open

    config = QuantizationConfig.model_validate(settings)
    schemes = {t: scheme for scheme in config.config_groups.values() for t in scheme.targets}
    with safe_open(folder / FILE, framework="pt") as file:
        stored: dict[str, list[str]] = {}
        for key in file.keys():  # noqa: SIM118  (safe_open has no __iter__)
            stored.setdefault(key.rpartition(".")[0], []).append(key)
        for name, wanted in names.items():
            stem = module(name)
            parts = {key.rpartition(".")[2]: file.get_tensor(key) for key in stored[stem]}
            parts = {k: v.float() if v.dtype.itemsize == 2 else v for k, v in parts.items()}
            scheme = schemes[stem]
            unpacker: Any = BaseCompressor.get_value_from_registry(scheme.format)
            found = unpacker.decompress(parts, scheme)["weight"]
            off = float((found.float() - wanted).abs().max())
            if off != 0:
                raise PlanError(
                    f"compressed-tensors unpacks {name} to weights that are off by up to {off:g}. "
                    "Nothing was kept; export to=torch, which holds every plan."
                )
    reader = f"compressed-tensors {version('compressed-tensors')}"
    return f"{reader}: every layer's weights are the plan's (vLLM itself needs a GPU)"
