"""Packed folders in transformers' own `from_pretrained`.

Their config.json names `mezzotint` as the quantization method and the packed file as the weights. Once
`optimizer` is imported, AutoModelForCausalLM.from_pretrained(folder) is `optimizer.load(folder)`: the
same checks of the manifest, the same numbers, in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimizer.errors import ConfigError
from optimizer.models.source import METHOD

# This module is imported while transformers is: what else there is of ours waits until it is used.
KEPT = ("config", "name_or_path", "is_quantized", "quantization_method", "hf_quantizer")


@register_quantization_config(METHOD)
class Settings(QuantizationConfigMixin):  # type: ignore[misc]  # transformers isn't typed here
    """What config.json says: nothing but the method; all else is in plan.json."""

    def __init__(self, quant_method: str = METHOD, **_: Any) -> None:
        self.quant_method = quant_method


@register_quantizer(METHOD)
class Packed(HfQuantizer):  # type: ignore[misc]
    """Leaves transformers nothing to load, and puts the packed model in its place afterwards."""

    requires_calibration = True
    _device = "cpu"

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        del dtype
        return torch.float32

    def _process_model_before_weight_loading(self, model: Any, **given: Any) -> Any:
        self._device = _one_device(given.get("device_map"))
        model._modules = {}
        model.all_tied_weights_keys = {}
        model._keys_to_ignore_on_load_unexpected = {".*"}
        model.tie_weights = lambda *_, **__: None
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from optimizer.formats.torch.packed import load

        own = load(Path(model.config._name_or_path), device=self._device)
        kept = {name: vars(model)[name] for name in KEPT if name in vars(model)}
        vars(model).clear()
        vars(model).update(vars(own))
        vars(model).update(kept)
        return model

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, **_: Any) -> bool:
        return False


def _one_device(given: Any) -> str:
    """Raises ConfigError for a model that is to be spread over several."""
    found = set(map(str, given.values())) if isinstance(given, dict) else {str(given or "cpu")}
    found = {f"cuda:{x}" if x.isdigit() else x for x in found}
    if len(found) != 1 or found & {"auto", "balanced", "sequential", "disk"}:
        raise ConfigError(
            f"A packed folder is loaded on one device, and device_map has {', '.join(sorted(found))}. "
            "Give device_map='cpu' or 'cuda:0', or leave it out."
        )
    return found.pop()
