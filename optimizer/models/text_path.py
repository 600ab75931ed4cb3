"""Which of a model's parameters a text reaches, and in which list of blocks.

A few tokens run through the model with every weight zero: one number that all of a tensor's elements
share, so that this needs neither the weights nor memory for them. What any operation touches is
reached; a vision tower, or a layer that only images enter, is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimizer.models.watching import plain_experts

TOKENS = 6
EXPERT = re.compile(r"(experts?)\.\d+\.")


class _Watch(TorchDispatchMode):
    """Notes which storages the operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.device.type == "cpu":
                self.seen.add(value.untyped_storage().data_ptr())
        return function(*args, **(kwargs or {}))


def reached(net: Any, encoder: bool) -> frozenset[str] | None:
    """Names of the parameters that a text reaches; None if the model can't be tried like this. net:
    on the meta device, its buffers outside of the checkpoint computed. All experts are reached if
    one is: which of them run depends on the weights."""
    values = {
        name: torch.zeros(1, dtype=value.dtype).as_strided(value.shape, [0] * value.ndim)
        for name, value in [*net.named_parameters(), *net.named_buffers()]
        if value.device.type == "meta"
    }
    inputs: dict[str, Any] = {"input_ids": _tokens(net.config)[None]}
    if encoder:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    else:
        inputs["use_cache"] = False
    watch = _Watch()
    try:
        # products of many experts at a time refuse tensors of one number
        with torch.no_grad(), watch, plain_experts(net):
            torch.func.functional_call(net, values, kwargs=inputs)
    except Exception:  # noqa: BLE001  an architecture's own code, on weights that no model has
        return None
    names = {name for name, _ in net.named_parameters()}
    found = {
        name
        for name, value in values.items()
        if name in names and value.untyped_storage().data_ptr() in watch.seen
    }
    alike = {EXPERT.sub(r"\1.*.", name) for name in found}
    return frozenset(name for name in names if EXPERT.sub(r"\1.*.", name) in alike)


def _tokens(config: Any) -> Tensor:
    """Ids of ordinary tokens: none that config.json names, such as an image's."""
    text = config.get_text_config()
    named = {
        value
        for part in (config, text)
        for key, value in part.to_dict().items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    size = getattr(text, "vocab_size", None) or TOKENS + len(named)
    free = [i for i in range(min(size, TOKENS + len(named) + 1)) if i not in named]
    return torch.tensor([free[i % len(free)] if free else 0 for i in range(TOKENS)])


def blocks(net: nn.Module, used: Iterable[str]) -> str | None:
    """The name of the list of blocks that a text runs through: of the lists that aren't part of
    another one, the one with the most members that hold a used parameter. None without any."""
    names = list(used)
    lists = [n for n, m in net.named_modules() if isinstance(m, nn.ModuleList) and n]
    counted = {}
    for name in lists:
        members = {x[len(name) + 1 :].split(".")[0] for x in names if x.startswith(f"{name}.")}
        counted[name] = len(members)
    outer = [
        name
        for name in lists
        if counted[name]
        and not any(name.startswith(f"{o}.") and counted[o] > 1 for o in lists if o != name)
    ]
    return max(outer, key=lambda name: (counted[name], -name.count(".")), default=None)
