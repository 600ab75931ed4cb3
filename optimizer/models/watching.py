"""A module's input as a matrix, and where gradients begin. What hooks of several measurements share.

A module may be called with keywords, return a tuple, hand out views that the model adds to in place,
or see only some of the tokens, or none: whoever watches it gets a tensor that nobody changes, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

LOOKS = {"__set__", "size", "stride", "storage_offset", "untyped_storage", "dim", "numel"}


def _only_looks(func: Any, result: Any) -> bool:
    """Whether a function tells something of a tensor and uses no number of it. A property may be
    another view of the numbers, such as T; `data` is how a block's weights are brought from disk."""
    name = getattr(func, "__name__", "")
    if name != "__get__":
        return name in LOOKS
    return not isinstance(result, Tensor) or func.__self__.__name__ == "data"


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


@contextmanager
def plain_experts(net: Any) -> Iterator[None]:
    """Experts one after the other, each with a product of its own."""
    before = net.get_experts_implementation()
    net.set_experts_implementation("eager")
    try:
        yield
    finally:
        net.set_experts_implementation(before)


class Inputs(TorchFunctionMode):
    """Hands out what every matrix product with a parameter, or with one expert's part of it, is given:
    use(parameter, first, rows, x) with the weight's first number in the parameter, its rows, and its
    inputs x [tokens, cols] in fp32.

    odd: how the model uses a parameter in a way that this can't follow, None while it doesn't.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], use: Callable[[str, int, int, Tensor], object]
    ) -> None:
        super().__init__()
        self.odd: str | None = None
        self._use = use
        self._known = {id(value): (name, value, 0) for name, value in parameters.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        found = [x for x in tree_leaves((args, kwargs)) if id(x) in self._known]
        if not found or _only_looks(func, result):
            return result
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        if func == Tensor.__getitem__ and self._is_part(result, found[0]):
            return result
        if func is linear and len(found) == 1 and weight is found[0] and weight.ndim == 2:
            name, _, first = self._known[id(weight)]
            x = rows_of(args, {k: v for k, v in kwargs.items() if k == "input"})
            assert x is not None
            self._met(name, first, x, result)
        else:
            self.odd = getattr(func, "__name__", str(func))
        return result

    def _met(self, name: str, first: int, x: Tensor, result: Tensor) -> None:
        self._use(name, first, result.shape[-1], x)

    def _is_part(self, part: Any, whole: Tensor) -> bool:
        """Notes one expert's weight, which lies in the memory of all experts'."""
        within = (
            isinstance(part, Tensor)
            and part.is_contiguous()
            and part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        )
        if within:
            name, _, first = self._known[id(whole)]
            first += part.storage_offset() - whole.storage_offset()
            self._known[id(part)] = (name, part, first)  # holding it, so that its id stays its own
        return within


class Products(Inputs):
    """As `Inputs`, with the gradient d [tokens, rows] at the product's outputs, in fp32, during the
    backward pass: use(parameter, first, x, d)."""

    def __init__(
        self, parameters: Mapping[str, Tensor], use: Callable[[str, int, Tensor, Tensor], None]
    ) -> None:
        super().__init__(parameters, lambda *_: None)
        self._then = use

    def _met(self, name: str, first: int, x: Tensor, result: Tensor) -> None:
        on_gradient(result, lambda d: self._then(name, first, x, d.flatten(0, -2).float()))
