"""Where a model's weights shall be while it runs, from what is free, and how it multiplies. Loads no
torch, but for a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from optimizer.errors import ConfigError
from optimizer.plan import WIDTH, Inventory, parse_size

WHERE = ("auto", "none", "cpu", "disk")
ARITHMETIC = ("auto", "fp32", "bf16", "fp16")
COMFORT = 2.5  # times the weights in fp32: they, sums of their size, and what runs
PIECES = 4  # times a block in fp32: its weights, squares, a gradient, and a rounded copy
LARGE = 2**28  # bytes in fp32 from which embeddings and head don't stay in memory
SPARE = 1.5  # times what must be free for the checkpoint's own numbers to be kept

Place = Literal["none", "device", "devices", "cpu", "disk"]


@dataclass(frozen=True)
class Residence:
    """offload: `none` keeps all weights in fp32; `cpu` keeps the checkpoint's own numbers, which are
    half as large in 16 bits, `disk` none, and both make fp32 of one block at a time; `auto` takes the
    first that fits. memory: what may be taken, such as 6GB; None: what is free. few: the work passes
    through the blocks a few times in all and on a CPU, where `disk` costs no time
    (experiments/14-scale): `auto` takes it for all but small models. processes: how many share what is
    free; each may take `memory`. device: where the model runs. On a GPU, `none` is in its memory: in
    fp32, or, if that is too much, as stored and in fp32 one block at a time (`device`), and on all
    GPUs where no single one is named and one is too small (`devices`). arithmetic: see
    `optimizer.models.arithmetic`."""

    offload: str = "auto"
    memory: str | None = None
    few: bool = False
    processes: int = 1
    device: str = "cpu"
    arithmetic: str = "auto"

    def check(self) -> None:
        """Raises ConfigError for what is no such choice."""
        if self.offload not in WHERE:
            raise ConfigError(f"offload is one of {', '.join(WHERE)}, not {self.offload!r}.")
        if self.arithmetic not in ARITHMETIC:
            raise ConfigError(
                f"arithmetic is one of {', '.join(ARITHMETIC)}, not {self.arithmetic!r}."
            )
        if self.memory is not None:
            parse_size(self.memory)

    def settled(self, inventory: Inventory) -> Place:
        """Raises ConfigError for a cap that one block, or what no block has, doesn't fit."""
        self.check()
        blocks, ends = _sizes(inventory)
        if not blocks:  # nothing comes and goes
            return "none"
        block, largest = max(blocks.items(), key=lambda one: one[1])
        least = least_work(inventory)
        room = self._room()
        if self.memory is not None and self.offload != "none" and room < least:
            raise ConfigError(
                f"memory={self.memory} is less than work on one block takes. The largest is block "
                f"{block} with {_mb(largest)} in fp32, and {_mb(sum(ends))} belong to no block, so "
                f"the smallest cap is memory={_mb(least).replace(' ', '')}."
            )
        stored = sum(prod(x.shape) * WIDTH[x.dtype] for x in inventory.held)
        whole = sum(blocks.values()) + sum(ends)
        if self.device != "cpu" and self.offload in ("auto", "none"):
            free = self._capped(device_room(self.device))
            if COMFORT * whole <= free:
                return "none"
            fits = SPARE * (stored + least) <= free
            if not fits and self.processes == 1 and self.memory is None:
                rooms = card_rooms(self.device, least)
                if len(rooms) > 1 and SPARE * stored <= sum(rooms.values()):
                    return "devices"
            if self.offload == "none" or fits:
                return "device"
            return "cpu" if SPARE * (stored + least) <= room else "disk"
        if self.offload != "auto":
            return self.offload  # type: ignore[return-value]  # as `check` saw
        if self.few and whole >= LARGE:
            return "disk"
        if COMFORT * whole <= room:
            return "none"
        return "cpu" if SPARE * (stored + least) <= room else "disk"

    def _room(self) -> int:
        import psutil

        if self.memory is not None:
            return int(parse_size(self.memory))
        return int(psutil.virtual_memory().available) // self.processes

    def _capped(self, free: int) -> int:
        return free if self.memory is None else min(free, int(parse_size(self.memory)))


def device_room(name: str) -> int:
    """Bytes that are free on a device other than the CPU. Apple's have the host's memory."""
    import psutil
    import torch

    device = torch.device(name)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def card_rooms(name: str, work: int) -> dict[str, int]:
    """Device -> bytes that are free for weights, of each GPU if no single one is named; the first is
    where the model runs and keeps room for so much work."""
    import torch

    if torch.device(name) != torch.device("cuda"):
        return {name: max(0, device_room(name) - int(SPARE * work))}
    every = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return {x: max(0, device_room(x) - int(SPARE * work) * (x == every[0])) for x in every}


def least_work(inventory: Inventory) -> int:
    """Bytes that work on the largest block takes, beside what stays in memory in fp32."""
    blocks, ends = _sizes(inventory)
    outside = sum(size for size in ends if size < LARGE)
    largest = max(blocks.values(), default=0)
    return PIECES * max(largest, max(ends, default=0) // 2) + outside


def _sizes(inventory: Inventory) -> tuple[dict[int, int], list[int]]:
    """Bytes in fp32 of each block's layers, and of each that no block has."""
    blocks: dict[int, int] = {}
    for layer in inventory.layers:
        if layer.block is not None:
            blocks[layer.block] = blocks.get(layer.block, 0) + 4 * layer.weights
    return blocks, [4 * layer.weights for layer in inventory.layers if layer.block is None]


def _mb(size: int) -> str:
    return f"{-(-size // 10**6)} MB"
