"""A model whose blocks lie on disk: a block's weights are in memory only while it is needed.

The last block that ran stays until another one is needed, so that passes in the order of the blocks
read each of them once. Large embeddings come to be looked up and go at once; a large head is
a unit of its own. Parameters keep their identity (hooks and gradients stay); while their block
is away they hold NaN, so that nothing computed without it can pass for a result. A backward pass
brings a block back when it needs the block's weights: they are not saved for it, but named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from optimizer.models.checkpoint import Checkpoint
from optimizer.models.layout import holders, scatter, whole
from optimizer.models.residence import LARGE
from optimizer.plan import Inventory, Layer, Other, Place

T = TypeVar("T")
PIECE = 2**26  # bytes of large embeddings, or a head, that are read at a time
Value = Callable[[str, Tensor], Tensor]  # a tensor's name, as it is stored -> what the model holds
Rows = Callable[[str, slice | Tensor], Tensor | None]  # some rows; None: only the whole is known


class OnDisk:
    """The blocks of `net` and its large embeddings and head, whose parameters `checkpoint` has;
    everything else stays in memory. Both are units, the blocks first."""

    def __init__(self, net: Any, inventory: Inventory, checkpoint: Checkpoint) -> None:
        """net: a skeleton with everything outside the blocks filled in."""
        self.value: Value = lambda _, stored: stored
        self.some: Rows = checkpoint.read
        self._net, self._checkpoint = net, checkpoint
        self._device = _outside_device(net)
        self._modules = blocks = block_list(net, inventory)
        self._outputs: int | None = None  # how many things a block returns; 0: hidden states alone
        large = large_ends(net, blocks, inventory)
        self._units = [dict(block.named_parameters()) for block in blocks]
        self._units += [{name: net.get_parameter(name)} for name in large]
        self._tensors = [*blocks_tensors(net, blocks, inventory), *large.values()]
        self._live = dict(net.named_parameters())
        self._home = {t.name: i for i, own in enumerate(self._tensors) for t in own}
        self._names: dict[str, int] = {}
        for i, own in enumerate(self._tensors):
            self._names |= {p.parameter: i for t in own for p in places(t)}
        self._here: set[int] = set()
        self._partly: set[int] = set()  # of these, what has only rows, while they are looked up
        self._taking_turns: greenlet | None = None
        self.brought = 0  # blocks that were read so far
        self.read = 0  # bytes of them, and of embeddings and head
        for index, block in enumerate(blocks):
            self._drop(index)
            self._watch(index, block)
        held = holders(net)
        for index, name in enumerate(large, len(blocks)):
            self._drop(index)
            owners = held[id(self._live[name])]
            alone = all(isinstance(module, nn.Embedding) for module, _ in owners)
            for module, leaf in owners:
                self._attend(index, module, leaf, alone)
        _OFFLOADED[net] = self

    def holds(self, tensor: str) -> bool:
        """Whether the checkpoint's tensor is one of a block's."""
        return tensor in self._home

    def bring(self, parameter: str) -> None:
        """Have the live parameter's numbers in memory, until another block is needed."""
        if parameter in self._names:
            self._bring(self._names[parameter])

    def renew(self, tensor: str) -> None:
        """`value` gives other numbers for the tensor than before."""
        home = self._home[tensor]
        if home >= len(self._modules):  # large: it comes in pieces when it is needed
            self._drop(home)
        elif home in self._here:
            self._fill([t for t in self._tensors[home] if t.name == tensor])

    def in_turns(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """What the jobs return. Each is one pass of the model without gradients; all of them run
        through a block before any enters the next one, which is then read once for all."""
        found: list[Any] = [None] * len(jobs)

        def run(index: int, job: Callable[[], T]) -> None:
            found[index] = job()

        self._taking_turns = getcurrent()
        try:
            passes = [greenlet(lambda i=i, job=job: run(i, job)) for i, job in enumerate(jobs)]
            while passes:
                for one in passes:
                    one.switch()
                passes = [one for one in passes if not one.dead]
        finally:
            self._taking_turns = None
        return found

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Inside, blocks return the hidden states that they get, for what only asks what comes
        behind them; nothing is read. Before any block has run, they run."""
        if self._outputs is None or any("forward" in vars(module) for module in self._modules):
            yield
            return
        more = (None,) * (self._outputs - 1)

        def same(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *more) if self._outputs else hidden

        try:
            for module in self._modules:
                module.forward = same
            yield
        finally:
            for module in self._modules:
                vars(module).pop("forward", None)

    # ------------------------------------------------------------ when a block runs

    def _watch(self, index: int, block: nn.Module) -> None:
        saving = ExitStack()

        def enter(module: nn.Module, _args: Any) -> None:
            if "forward" in vars(module):
                return  # somebody stands in for the block
            if self._taking_turns not in (None, getcurrent()):
                self._taking_turns.switch()
            self._bring(index)
            if torch.is_grad_enabled():
                saving.enter_context(self._naming(index))

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            saving.close()
            self._outputs = len(output) if isinstance(output, tuple) else 0

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave, always_call=True)

    def _attend(self, index: int, module: nn.Module, leaf: str, alone: bool) -> None:
        """Large embeddings or a head. alone: they are no head's, too, and go right after their module
        ran, since no gradient needs them."""
        own = next(iter(self._units[index].values()))
        saving = ExitStack()

        def enter(module: nn.Module, args: Any) -> None:
            if module._parameters.get(leaf) is not own:
                return  # somebody gives it other weights
            looks_up = isinstance(module, nn.Embedding) and bool(args)
            if looks_up and index not in self._here and self._bring_rows(index, args[0]):
                return
            self._bring(index)
            if torch.is_grad_enabled() and not alone:
                saving.enter_context(self._naming(index))

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            saving.close()
            if index in self._partly or (alone and index in self._here):
                self._drop(index)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """What a backward pass needs of the block's weights is noted as where to find it."""
        starts = {p.untyped_storage().data_ptr(): p for p in self._units[index].values()}

        def pack(saved: Tensor) -> Any:
            if saved.device.type == "meta" or saved.layout != torch.strided:
                return saved
            owner = starts.get(saved.untyped_storage().data_ptr())
            if owner is None:
                return saved
            return owner, saved.size(), saved.stride(), saved.storage_offset()

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            owner, size, stride, offset = kept
            self._bring(index)
            found: Tensor = owner.detach().as_strided(size, stride, offset)
            return found

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    # ------------------------------------------------------------ bring and drop

    def _bring(self, index: int) -> None:
        if index in self._here:
            return
        blocks = len(self._modules)
        for other in list(self._here):
            # a head leaves the last block for other windows, but not beside what gradients need
            if index < blocks or other >= blocks or torch.is_grad_enabled():
                self._drop(other)
        with torch.inference_mode(False), torch.no_grad():
            for value in self._units[index].values():
                value.data = torch.empty(value.shape, dtype=value.dtype, device=self._device)
            try:
                if not self._fill_pieces(index):
                    self._fill(self._tensors[index])
            except BaseException:
                self._drop(index)  # half of its numbers are none
                raise
        self._here.add(index)
        self.brought += index < blocks

    def _bring_rows(self, index: int, ids: Tensor) -> bool:
        """Those rows of embeddings that are looked up now; no memory is taken for the others. False,
        and nothing done, where their numbers aren't simply the checkpoint's."""
        plain = self._plain(index)
        if plain is None:
            return False
        name, value = plain
        with torch.inference_mode(False), torch.no_grad():
            rows = ids.unique()
            value.data = torch.empty(value.shape, dtype=value.dtype, device=self._device)
            if not self._copy_rows(name, value, rows):
                self._drop(index)
                return False
        self._here.add(index)
        self._partly.add(index)
        return True

    def _plain(self, index: int) -> tuple[str, nn.Parameter] | None:
        """The one tensor that a large embedding or head is, row by row, and its parameter; None for
        blocks."""
        if index < len(self._modules) or len(self._tensors[index]) != 1:
            return None
        [tensor], [(name, value)] = self._tensors[index], self._units[index].items()
        alike = places(tensor) == (whole(name, tuple(value.shape)),) and value.ndim == 2
        return (tensor.name, value) if alike else None

    def _copy_rows(self, name: str, value: nn.Parameter, rows: slice | Tensor) -> bool:
        """False, and nothing done, where only the whole tensor is known."""
        stored = self.some(name, rows)
        if stored is None:
            return False
        self.read += stored.nbytes
        value.data[rows] = stored.to(value)
        return True

    def _drop(self, index: int) -> None:
        self._here.discard(index)
        self._partly.discard(index)
        with torch.inference_mode(False), torch.no_grad():
            for value in self._units[index].values():
                value.data = absent(value, self._device)

    def _fill_pieces(self, index: int) -> bool:
        """As `_fill`, PIECE bytes of the file at a time. False where it can't be."""
        plain = self._plain(index)
        if plain is None:
            return False
        name, value = plain
        some = max(1, PIECE // (4 * value.shape[1]))
        pieces = (slice(start, start + some) for start in range(0, len(value), some))
        return all(self._copy_rows(name, value, piece) for piece in pieces)

    def _fill(self, tensors: Sequence[Layer | Other]) -> None:
        known = {tensor.name: tensor for tensor in tensors}
        with torch.inference_mode(False), torch.no_grad():
            for name, stored in self._checkpoint.several(list(known)):
                self.read += stored.nbytes
                scatter(self.value(name, stored), places(known[name]), self._data)

    def _data(self, parameter: str) -> Tensor:
        return self._live[parameter].data


def present(net: nn.Module, module: nn.Module) -> None:
    """Have the module's own weights in memory, until a block is needed."""
    disk = offloaded(net)
    if disk is not None:
        own = {id(value) for value in module.parameters()}
        for name, value in net.named_parameters():
            if id(value) in own:
                disk.bring(name)


_OFFLOADED: WeakKeyDictionary[nn.Module, OnDisk] = WeakKeyDictionary()


def offloaded(net: nn.Module) -> OnDisk | None:
    """Where the model's blocks come from; None for one that is in memory."""
    return _OFFLOADED.get(net)


def places(tensor: Layer | Other) -> tuple[Place, ...]:
    """Where the model holds the tensor's numbers."""
    return tensor.places or (whole(tensor.parameter, tensor.shape),)


def block_list(net: nn.Module, inventory: Inventory) -> list[nn.Module]:
    """The transformer blocks, which the inventory numbered; none for a model without any."""
    layer = next((x for x in inventory.layers if x.block is not None), None)
    if layer is None:
        return []
    stem, _, _ = layer.parameter.partition(f".{layer.block}.")
    blocks: Any = net.get_submodule(stem)
    return list(blocks)


def blocks_tensors(
    net: nn.Module, blocks: Sequence[nn.Module], inventory: Inventory
) -> list[list[Layer | Other]]:
    """The tensors whose numbers only one block's parameters hold; others stay in memory."""
    held = holders(net)
    owner: dict[str, int] = {}
    modules = [set(block.modules()) for block in blocks]
    names = {id(value): name for name, value in net.named_parameters()}
    for index, own in enumerate(modules):
        for value in blocks[index].parameters():
            if all(module in own for module, _ in held[id(value)]):
                owner[names[id(value)]] = index
    found: list[list[Layer | Other]] = [[] for _ in blocks]
    for tensor in inventory.held:
        homes = {owner.get(place.parameter) for place in places(tensor)}
        home = homes.pop() if len(homes) == 1 else None
        if home is not None:
            found[home].append(tensor)
    return found


def large_ends(
    net: Any, blocks: Sequence[nn.Module], inventory: Inventory
) -> dict[str, list[Layer | Other]]:
    """Parameter -> its tensors, of the large embeddings and head. Those whose tensor lies in several
    parameters stay."""
    inside = {id(value) for block in blocks for value in block.parameters()}
    ends = [net.get_input_embeddings(), net.get_output_embeddings()]
    found: dict[str, list[Layer | Other]] = {}
    for name, value in net.named_parameters():
        owners = [module for module, _ in holders(net)[id(value)]]
        at_an_end = all(any(module is end for end in ends) for module in owners)
        if id(value) in inside or not at_an_end or 4 * value.numel() < LARGE:
            continue
        own = [t for t in inventory.held if any(p.parameter == name for p in places(t))]
        if all(p.parameter == name for t in own for p in places(t)):
            found[name] = own
    return found


def absent(value: Tensor, device: torch.device) -> Tensor:
    """One NaN, seen as a tensor of the shape."""
    fill = float("nan") if value.dtype.is_floating_point else 0
    return torch.full((1,), fill, dtype=value.dtype, device=device).expand(value.shape)


def _outside_device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device
