"""A module's input as a matrix, and where gradients begin. What hooks of several measurements share.

A module may be called with keywords, return a tuple, hand out views that the model adds to in place,
or see only some of the tokens, or none: whoever watches it gets a tensor that nobody changes, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor that a module is called with, as [tokens, columns] fp32 of its own memory."""
    found = first_tensor(args, kwargs)
    return None if found is None else found.detach().flatten(0, -2).float().clone()


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    every = (*args, *kwargs.values())
    return next((x for x in every if isinstance(x, Tensor) and x.is_floating_point()), None)


def on_gradient(output: Any, use: Callable[[Tensor], None]) -> bool:
    """Call `use` with the gradient at a module's output, as it was before anyone changes it in
    place. False: the output isn't one tensor, or no gradient will reach it."""
    if not isinstance(output, Tensor) or not output.requires_grad:
        return False
    output.register_hook(use)
    return True


def begin_gradients(net: Any) -> Any:
    """Let gradients begin at the embeddings' output; returns the hook's handle. The model gets a copy,
    which it may change in place."""

    def forward(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_(True).clone()

    return net.get_input_embeddings().register_forward_hook(forward)
