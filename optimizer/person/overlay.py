"""Writing with a quantized model: it goes on by itself where it is sure, and stops where it isn't.

The signal is the one that unpack=hard goes by, where the plan has one (its base writes then), else the
entropy of the next token. As many tokens count as unsure as the plan's predicted loss may change: two
distributions of divergence KL differ on at most sqrt(KL / 2) of the tokens (Pinsker), so the threshold
is that quantile of the signal along what the model writes by itself, its likeliest words. (Along text
sampled from it, tokens are far less sure, and it would hardly ever stop.)

A choice is kept as minimal pairs: what stood there, what was taken, and what was passed over.
"""

from __future__ import annotations

import json
import math
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.data import pairs as probes
from optimizer.errors import StorageError
from optimizer.models.source import context_length
from optimizer.person.entrants import Entrant, Open, opened
from optimizer.person.prompts import gather, in_turn
from optimizer.person.settings import DOMAINS
from optimizer.person.votes import VoteFile
from optimizer.person.writing import Ids, encode_prompt, ends, said
from optimizer.plan import digest
from optimizer.stages.view import View
from optimizer.store import Store

VERSION = 3
SAMPLES, LENGTH = 8, 32  # texts that the model goes on with, for the threshold, and tokens of each
LEAST, USUAL, MOST = 0.02, 0.1, 0.25  # shares of unsure tokens; the middle one without a plan
PHENOMENON = "choice"


@dataclass(frozen=True)
class Step:
    """What was added to a text. marks: where in the whole text (characters) the model was unsure.
    unsure: whether it stopped for that; ended: whether it ended the text itself."""

    text: str
    marks: tuple[int, ...]
    unsure: bool
    ended: bool


@dataclass(frozen=True)
class Offer:
    """Ways to go on from a text; `reference` is the number of the reference's own, if it was asked."""

    id: str
    prefix: str
    texts: tuple[str, ...]
    reference: int | None = None


def share_of(entrant: Entrant, wanted: float | None) -> float:
    """Of the tokens at which to stop."""
    if wanted is not None:
        return wanted
    if entrant.plan is None:
        return USUAL
    kl = max(float(entrant.plan.predicted["kl"]), 0.0)
    return float(np.clip(np.sqrt(kl / 2), LEAST, MOST))


class Writer:
    """A loaded model that continues texts. One call at a time."""

    def __init__(
        self, entrant: Entrant, share: float, store: Store, device: str, view: View
    ) -> None:
        self.entrant, self.share = entrant, share
        self._store, self._device, self._view = store, device, view
        self._lock, self._stack = threading.Lock(), ExitStack()
        self._model: Open | None = None
        self._threshold: float | None = None

    @property
    def model(self) -> Open:
        """Loaded at the first use."""
        if self._model is None:
            self._model = self._stack.enter_context(
                opened(self.entrant, self._store, self._device, self._view, base=True)
            )
        return self._model

    @property
    def signal(self) -> Any:
        """Of `models.planes`: higher where the next word is less sure."""
        from optimizer.formats.torch.modes import signal_of
        from optimizer.models.planes import Signal

        plan = self.entrant.plan
        if plan is None or plan.refinement is None or not plan.refinement.hard:
            return Signal("entropy")
        return signal_of(self.model.net, plan)

    @property
    def stops(self) -> str:
        """Where it stops, for a person."""
        if self.signal.kind == "probe":  # of the log of the loss
            return f"its plan's probe foretells a loss above {math.exp(self.threshold):.3g} nats"
        return f"its {self.signal.kind} is above {self.threshold:.2f} nats"

    @property
    def threshold(self) -> float:
        """The signal above which a token counts as unsure."""
        if self._threshold is None:
            key = digest(["signal", VERSION, self.entrant.identity])
            kept = self._store.arrays("entropies", key, self._along)
            assert kept is not None
            self._threshold = float(np.quantile(kept["signal"], 1 - self.share))
        return self._threshold

    def _along(self) -> dict[str, np.ndarray]:
        prompts = in_turn(gather(None, DOMAINS, ()), SAMPLES)
        length = min(LENGTH, self._room // 2)
        found = []
        for prompt in self._view.track(prompts, "how sure it is of what it writes"):
            ids = self._prompt(prompt.text, length)
            found += [value for _, value in self._tokens(ids, length)]
        return {"signal": np.array(found)}

    @property
    def _room(self) -> int:
        """Tokens that the model can read."""
        return context_length(self.entrant.home.folder) or 2**20

    def _prompt(self, text: str, more: int) -> Ids:
        """The end of a text, as far as it and `more` tokens fit the context."""
        ids = encode_prompt(self.model.tokenizer, text, chat=False)
        return ids[-max(1, self._room - more) :]

    def go_on(self, text: str, stretch: int, stop: bool) -> Step:
        """At most `stretch` tokens; with `stop`, up to the first that it is unsure of. It never stops
        before its first token, so that going on always goes on."""
        with self._lock:
            prompt = self._prompt(text, stretch)
            ids: Ids = []
            marks: list[int] = []
            unsure = ended = False
            for token, value in self._tokens(prompt, stretch):
                if token in ends(self.model.net):
                    ended = True
                    break
                if value > self.threshold:
                    if stop and ids:
                        unsure = True
                        break
                    marks.append(len(ids))
                ids.append(token)
            added = said(self.model.tokenizer, prompt, ids)
            at = [len(text) + len(said(self.model.tokenizer, prompt, ids[:n])) for n in marks]
            return Step(added, tuple(at), unsure, ended)

    def _tokens(self, prompt: Ids, most: int) -> Iterator[tuple[int, float]]:
        """The likeliest next tokens one after the other, each with the signal at its place."""
        import torch

        from optimizer.models.planes import watched

        net, past, signal = self.model.net, self.model.cache(), self.signal
        device = next(net.parameters()).device
        ids = torch.tensor([prompt], device=device)
        with watched(net) if signal.kind == "probe" else nullcontext([ids]) as seen:
            for _ in range(most):
                with torch.inference_mode():
                    out = net(input_ids=ids, past_key_values=past, use_cache=True)
                past, logits = out.past_key_values, out.logits[:, -1].float()
                token = int(logits.argmax())
                yield token, float(signal(logits, seen[0][:, -1])[0])
                ids = torch.tensor([[token]], device=device)

    def offers(self, text: str, count: int, words: int) -> tuple[str, ...]:
        """The likeliest next tokens, each with what it would go on with; different texts only."""
        import torch

        with self._lock:
            prompt = self._prompt(text, words)
            net = self.model.net
            ids = torch.tensor([prompt], device=next(net.parameters()).device)
            with torch.inference_mode():
                logits = net(input_ids=ids, use_cache=False).logits[0, -1].float()
            found: list[str] = []
            for token in logits.topk(min(2 * count, len(logits))).indices.tolist():
                if token not in ends(net):
                    rest = [t for t, _ in self._tokens([*prompt, token], words - 1)]
                    end = next((i for i, t in enumerate(rest) if t in ends(net)), len(rest))
                    offer = said(self.model.tokenizer, prompt, [token, *rest[:end]])
                    found += [offer] if offer.strip() and offer not in found else []
                if len(found) == count:
                    break
            return tuple(found)

    def close(self) -> None:
        self._stack.close()


def pairs_of(prefix: str, taken: str, passed: Sequence[str], language: str) -> list[probes.Pair]:
    """The choice as minimal pairs: one for each that was passed over. Those of which one begins with
    the other decide nothing and are left out."""
    name = uuid.uuid4().hex[:12]
    return [
        probes.Pair(f"{PHENOMENON}-{name}-{i}", PHENOMENON, language, prefix, taken, other)
        for i, other in enumerate(passed)
        if other.strip() and not taken.startswith(other) and not other.startswith(taken)
    ]


class ChoiceFile:
    """choices.jsonl, in the format of the probes; only ever appended to, and on the disk at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            probes.read(path)  # another file is not added to

    def append(self, pairs: Sequence[probes.Pair]) -> None:
        """Raises StorageError, and then nothing was kept."""
        rows = [json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs]
        try:
            VoteFile(self.path).put("".join(rows).encode())
        except StorageError as error:
            raise StorageError(str(error).replace("votes=FILE", "choices=FILE")) from None
