"""What experts are given that lie in one tensor, where no module of theirs can be watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from optimizer.errors import ModelError
from optimizer.models.model import Model
from optimizer.models.watching import Inputs, plain_experts


class Experts:
    """The experts of a model whose matrices lie row by row in tensors of their own."""

    def __init__(self, model: Model) -> None:
        self._model = model
        own = [x for x in model.inventory.layers if x.fused]
        self._starts = {x.name: at for x in own if (at := x.start) is not None}
        self._order: list[str] = []  # their parameters, as the model multiplies with them

    def holds(self, layer: str) -> bool:
        return layer in self._starts

    @contextmanager
    def learning(self) -> Iterator[None]:
        """While a whole pass runs: in which order the model multiplies. Where it does something else
        with them, none is known afterwards."""
        if not self._starts:
            yield
            return
        seen: dict[str, None] = {}
        with self._watching(lambda name, *_: seen.setdefault(name)) as watch:
            yield
        self._order = [] if watch.odd else list(seen)

    def steps(self, block: int) -> list[list[list[str]]]:
        """One after the other, what reads other layers' results; of each, the sets of layers that are
        given the same: an expert's."""
        found: dict[str, dict[int | None, list[str]]] = {name: {} for name in self._order}
        for name, (parameter, _) in self._starts.items():
            layer = self._model.layers[name]
            if layer.block == block and parameter in found:
                found[parameter].setdefault(layer.expert, []).append(name)
        return [list(sets.values()) for sets in found.values() if sets]

    def summed(
        self,
        sets: Sequence[Sequence[str]],
        found: Sequence[Tensor],
        count: Callable[[Tensor, Tensor], object],
        run: Callable[[], None],
    ) -> None:
        """Counts what each set is given [tokens, cols] while `run` runs their block. count: adds it to
        what is found of the set."""
        numbers = {min(self._starts[n] for n in names): i for i, names in enumerate(sets)}

        def add(parameter: str, first: int, _rows: int, x: Tensor) -> None:
            number = numbers.get((parameter, first))
            if number is not None:
                count(found[number], x)

        with self._watching(add) as watch:
            run()
        if watch.odd:
            raise ModelError(
                f"Experts of {type(self._model.net).__name__} are used in two ways ({watch.odd}), so "
                "that what they are given can't be seen. Take quantizer=rtn."
            )

    @contextmanager
    def _watching(self, use: Callable[[str, int, int, Tensor], object]) -> Iterator[Inputs]:
        net = self._model.net
        names = {parameter for parameter, _ in self._starts.values()}
        watch = Inputs({name: net.get_parameter(name) for name in names}, use)
        with torch.no_grad(), plain_experts(net), watch:
            yield watch
