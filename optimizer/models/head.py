"""The output head: what it receives, and what follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from greenlet import getcurrent
from torch import Tensor, nn

from optimizer.errors import ModelError
from optimizer.models.arithmetic import sized
from optimizer.models.halving import in_parts
from optimizer.models.offload import offloaded, present

# glibc gives pieces of 32 MiB or more back at once; smaller ones tore the heap to gigabytes.
LOGITS = 9 * 2**22  # bytes of logits that exist at one time, some times over
MOST = 512  # tokens of which they are at most
LARGE_LOGITS = 2**27  # on a GPU
LARGE = 2**24  # bytes in fp32 from which a head's copy is kept as it is stored
PIECE = 2**22  # numbers of such a copy that are multiplied at a time
BATCH_TOKENS = 2048  # tokens that run through the blocks together


class Predictor:
    """A model's head and what follows it: hidden states -> log-probabilities of the next token."""

    def __init__(self, net: nn.Module) -> None:
        self._head = output_head(net)
        self._shape = final_transform(net)
        self.together = tokens_together(self._head)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Input of the head [tokens, width] -> [tokens, vocabulary]. Give `together` at most."""
        return torch.log_softmax(self._shape(self._head(hidden).float()), -1)


class OwnHead:
    """The output head with the weights that it has now, while the live one may get others. A large one
    that is a plain product is kept in the 16 bits that hold its numbers, if any do, and multiplied
    some rows at a time."""

    def __init__(self, net: nn.Module) -> None:
        self._head: Any = output_head(net)
        present(net, self._head)
        self._weights = {n: p.detach() for n, p in self._head.named_parameters()}
        self._small: Tensor | None = None
        if type(self._head) is nn.Linear and self._weights["weight"].nbytes >= LARGE:
            self._small = _in_16_bits(self._weights.pop("weight"))
        self._weights = {name: value.clone() for name, value in self._weights.items()}

    def __call__(self, hidden: Tensor) -> Tensor:
        """[tokens, width] -> [tokens, vocabulary] fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            if self._small is None:
                found: Tensor = torch.func.functional_call(self._head, self._weights, (hidden,))
                return found.float()
            rows, columns = self._small.shape
            logits = hidden.new_empty(*hidden.shape[:-1], rows, dtype=torch.float32)
            some, bias = max(1, PIECE // columns), self._weights.get("bias")
            for i in range(0, rows, some):
                part = self._small[i : i + some].float()
                torch.matmul(hidden.float(), part.T, out=logits[..., i : i + some])
            return logits if bias is None else logits.add_(bias)


def _in_16_bits(weight: Tensor) -> Tensor:
    """The same numbers in 16 bits if they have those, else a copy."""
    for dtype in (torch.bfloat16, torch.float16):
        pieces = weight.split(max(1, PIECE // weight.shape[1]))
        if all(torch.equal(x.to(dtype).to(x.dtype), x) for x in pieces):
            return weight.to(dtype)
    return weight.clone()


def tokens_together(head: Any) -> int:
    """Of how many tokens the logits fit in LOGITS bytes."""
    weight = getattr(head, "weight", None)
    if weight is None:
        return MOST
    bytes_of_logits = sized(weight.device, LOGITS, LARGE_LOGITS)
    return max(1, min(MOST, bytes_of_logits // (4 * len(weight))))


def batches(ids: np.ndarray, together: int | None = None) -> Iterator[Tensor]:
    step = together or windows_together(ids)
    for i in range(0, len(ids), step):
        yield torch.from_numpy(ids[i : i + step])


def windows_together(ids: np.ndarray) -> int:
    """How many windows run through the blocks together."""
    return max(1, BATCH_TOKENS // ids.shape[1])


def output_head(net: Any) -> nn.Module:
    head: nn.Module | None = net.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(net).__name__} has no output head, so it predicts no tokens.")
    return head


def hidden_states(
    net: nn.Module, ids: np.ndarray, together: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (ids [b, l], input of the head [b, l, width]), `together` windows each. Raises
    ModelError for a head that reads something else."""
    device = next(net.parameters()).device
    disk = offloaded(net)
    if disk is not None:  # each block is read once for all windows
        every = [batch.to(device) for batch in batches(ids, together)]
        with torch.inference_mode():
            entered = disk.in_turns([partial(_whole_input, net, batch) for batch in every])
        yield from ((b, _of_each_token(net, b, x)) for b, x in zip(every, entered, strict=True))
        return
    for batch in batches(ids, together):
        with torch.inference_mode():
            found = _whole_input(net, batch.to(device))
            yield batch.to(device), _of_each_token(net, batch, found)


def _whole_input(net: nn.Module, ids: Tensor) -> Tensor:
    """What the head receives, from as many windows at a time as the device has room for."""
    found = in_parts(net, len(ids), lambda part: head_input(net, ids[part]))
    return found[0] if len(found) == 1 else torch.cat(found)


def _of_each_token(net: nn.Module, ids: Tensor, hidden: Tensor) -> Tensor:
    if hidden.shape[:-1] != ids.shape:
        raise ModelError(
            f"{type(net).__name__} gives its head {tuple(hidden.shape[:-1])} vectors for "
            f"{tuple(ids.shape)} tokens: it predicts several tokens ahead at a time, so that its "
            "predictions can't be compared token by token. This architecture isn't supported; take "
            "one that predicts the next token."
        )
    return hidden


def head_input(net: nn.Module, ids: Tensor) -> Tensor:
    """ids [b, l] -> what the head receives [b, l, width]. The head itself runs on one position
    of one window only, so full logits never exist."""
    caught: list[Tensor] = []
    own = getcurrent()

    def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if getcurrent() is not own:
            return None  # another pass of those that take turns
        caught.append(args[0])
        return (args[0][:1, -1:].contiguous(),)

    handle = output_head(net).register_forward_pre_hook(catch)
    try:
        net(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def final_transform(net: Any) -> Callable[[Tensor], Tensor]:
    """What the architecture does to the head's output: nothing, scaling (Granite, Falcon-H1),
    soft-capping (Gemma, xLSTM), fixed logits for some tokens. Found by sending known numbers through
    it in the head's place, so that no weights and no names in a config matter. Raises ModelError for
    anything else."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(net.parameters()).device)
    first, other = (_probe(net, ids, WIDE, shift) for shift in (0, 7))
    low, high = (_probe(net, ids, NARROW, shift) for shift in (0, 7))
    sent, found = first
    free = low[1] != high[1]  # of numbers that no cap makes alike; all of these differ
    shape = _fitted(sent[free].double(), found[free].double(), _numbers(net.config))
    if shape is not None and _agrees(shape(other[0][free]), other[1][free]):
        if bool(free.all()):
            return shape
        return partial(_with_fixed, shape, ~free, found)
    raise ModelError(
        f"{type(net).__name__} does something else to its head's output than to scale or to cap it, "
        "so that its predictions can't be computed from the head alone. This architecture isn't "
        "supported."
    )


WIDE = torch.cat([torch.linspace(-60, 60, 31), torch.tensor([1e-3, -1e-2, 0.1, 1e5, -1e5])])
NARROW = torch.linspace(-0.5, 0.5, 31)


def _probe(net: Any, ids: Tensor, values: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Numbers [vocabulary] that take the place of the head's output at one position, and what the
    model makes of them. values: repeated over the vocabulary, from the place `shift` on."""
    sent: list[Tensor] = []

    def shorten(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:1, -1:].contiguous(),)

    def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        row = values.repeat(-(-output.shape[-1] // len(values)) + 1)
        sent[:] = [row[shift : shift + output.shape[-1]].to(output)]
        return sent[0].expand_as(output).clone()

    head, disk = output_head(net), offloaded(net)
    handles = [head.register_forward_pre_hook(shorten), head.register_forward_hook(replace)]
    try:
        with torch.inference_mode(), disk.bypassed() if disk is not None else nullcontext():
            found = net(input_ids=ids, use_cache=False).logits
    except (IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if disk is not None and "single memory location" in str(error):  # an absent weight's
            raise ModelError(
                f"{type(net).__name__} changes its own weights as it runs, so that they can't be "
                "read anew block by block. Take offload=none."
            ) from None
        if not sent:
            raise ModelError(
                f"transformers can't run {type(net).__name__} on text ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}). Correct what config.json says of it."
            ) from None
        sent.clear()  # what follows the head wants another shape than one position
    finally:
        for handle in handles:
            handle.remove()
    if not sent or found[0, -1].shape != sent[0].shape:
        raise ModelError(
            f"{type(net).__name__} doesn't use its output head as a layer whose outputs are logits, "
            "so that its predictions can't be computed from the head alone. This architecture isn't "
            "supported."
        )
    return sent[0].float(), found[0, -1].float()


def _numbers(config: Any) -> list[float]:
    """Every number in a config: an architecture's factors are among them, exactly."""
    values = config.get_text_config().to_dict().values()
    return [float(v) for v in values if isinstance(v, int | float) and v]


def _fitted(z: Tensor, y: Tensor, numbers: list[float]) -> Callable[[Tensor], Tensor] | None:
    """The function of the known kinds that takes z to y; None if none does."""
    if torch.allclose(y, z, rtol=1e-6):
        return unchanged
    if len(z) == 0 or not bool(torch.isfinite(y).all()):
        return None
    small, large = z.abs() < 0.5, z.abs() > 1e4
    if not (small & (z != 0)).any() or not large.any():
        return None
    slope = float((y / z)[small & (z != 0)].median())
    cap = float(y[large].abs().max())
    factors = sorted(
        [(v, False) for v in numbers] + [(v, True) for v in numbers],
        key=lambda f: abs((1 / f[0] if f[1] else f[0]) - slope),
    )
    caps = [*sorted(numbers, key=lambda v: abs(v - cap))[:1], cap]
    scales = [partial(_scale, by=by, divide=divide) for by, divide in factors[:2]]
    scales.append(partial(_scale, by=slope, divide=False))
    candidates: list[Callable[[Tensor], Tensor]] = list(scales)
    before: list[Callable[[Tensor], Tensor]] = [unchanged, *scales]
    candidates += [partial(_cap, cap=c, scale=scale) for c in caps for scale in before]
    return next((f for f in candidates if _agrees(f(z), y)), None)


def _agrees(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=2e-5, atol=1e-6)


def _scale(z: Tensor, by: float, divide: bool) -> Tensor:
    return z / by if divide else z * by


def _cap(z: Tensor, cap: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.tanh(scale(z) / cap) * cap


def _with_fixed(
    shape: Callable[[Tensor], Tensor], fixed: Tensor, values: Tensor, z: Tensor
) -> Tensor:
    return torch.where(fixed, values, shape(z))


def unchanged(logits: Tensor) -> Tensor:
    return logits


def entrywise(shape: Callable[[Tensor], Tensor]) -> bool:
    """Whether what `final_transform` found does the same to every token's logit, whichever others are
    there."""
    return getattr(shape, "func", shape) is not _with_fixed


def is_head(net: Any, parameter: str) -> bool:
    """Whether the named parameter is the output head's, perhaps shared with the embeddings."""
    return net.get_parameter(parameter) is getattr(net.get_output_embeddings(), "weight", None)
