"""What the entrants write after the prompts, and how far each is from the reference there.

    kl          mean KL(reference || entrant) of the tokens of the reference's own text, nats
    tail        mean of the worst tenth of those
    margin      for a probe's prefix that the reference separates: what it lost of its margin, nats
    length      log of the text's length over the reference's, in characters
    repetition  share of 4-grams of the text that occurred in it before
The first three need the reference's tokenizer, so entrants of other models lack them.

Everything is kept by entrant: a killed run goes on with the next one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.data.domains import UNKNOWN
from optimizer.data.text import Windows, encode, text_prefix
from optimizer.errors import ConfigError, TextError
from optimizer.metrics import generation
from optimizer.models.source import context_length
from optimizer.person.entrants import Entrant, Open, opened, template
from optimizer.person.prompts import Prompt
from optimizer.plan import digest
from optimizer.stages.view import View
from optimizer.store import Store

if TYPE_CHECKING:
    from optimizer.metrics.divergence import Teacher

VERSION = 1  # raised when the same entrants write other texts, or features change
TOGETHER = 16  # texts that are written in one batch
WORST = 0.1  # share of the tokens in the tail
SEPARATED = 0.5  # nats; a margin of the reference below it counts as none
LATEST = 0.75  # of a text: a catch trial parts in its first three quarters
FEATURES = ("kl", "tail", "margin", "length", "repetition")

Ids = list[int]


@dataclass(frozen=True)
class Written:
    """What one entrant said: texts and features by the prompt's id."""

    texts: dict[str, str]
    features: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Material:
    """prompts: those that every entrant can read. skipped: how many others, by reason. written: by
    the entrant's name. reference: the same of the reference. twins: what the reference would say if,
    where it was least sure, it took its second choice: as good a text of its own."""

    prompts: list[Prompt]
    skipped: dict[str, int]
    written: dict[str, Written]
    reference: Written
    twins: Written
    key: str


@dataclass(frozen=True)
class Asked:
    """tokens: of a text at most. chat: put prompts as the model's chat template wants them. twins: for
    how many prompts the reference's second text is written."""

    tokens: int
    chat: bool
    device: str
    twins: int


def write(
    entrants: Sequence[Entrant],
    reference: Entrant,
    prompts: Sequence[Prompt],
    most: int,
    asked: Asked,
    store: Store,
    view: View,
) -> Material:
    """Everything that can be shown; from the store, or written now. At most `most` prompts."""
    from optimizer.person.prompts import in_turn

    _check_templates([*entrants, reference], asked)
    homes = sorted({one.home.fingerprint for one in [*entrants, reference]})
    key = digest([VERSION, homes, [p.id for p in prompts], most, asked.tokens, asked.chat])

    def readable() -> dict[str, Any]:
        kept, skipped = _readable([*entrants, reference], prompts, asked)
        return {"use": [p.id for p in in_turn(kept, most)], "skipped": skipped}

    found = store.json("prompts", key, readable)
    known = {prompt.id: prompt for prompt in prompts}
    use = [known[i] for i in found["use"]]
    if not use:
        reasons = ", ".join(f"{n} {why}" for why, n in found["skipped"].items()) or "none given"
        raise TextError(
            f"None of the {len(prompts)} prompts can be continued by all of these models: {reasons}. "
            "Give others with prompts=FILE, or lower tokens."
        )
    job = _Job(reference, use, asked, store, view)
    own = job.of_reference()
    written = {one.name: job.of(one) for one in entrants}
    identities = [one.identity for one in entrants]
    return Material(
        use,
        found["skipped"],
        written,
        own,
        job.twins(),
        digest([key, reference.identity, identities]),
    )


def _check_templates(entrants: Iterable[Entrant], asked: Asked) -> None:
    for one in entrants:
        if asked.chat and template(one.home.folder) is None:
            raise ConfigError(
                f"chat=true puts prompts as a model's chat template wants them, and {one.home.name} "
                "has none. Say chat=false."
            )


def _readable(
    entrants: Iterable[Entrant], prompts: Sequence[Prompt], asked: Asked
) -> tuple[list[Prompt], dict[str, int]]:
    from optimizer.models.tokenizer import load_tokenizer

    left, skipped = list(prompts), {"longer than the context": 0, "not representable": 0}
    for one in {e.home.fingerprint: e for e in entrants}.values():
        tokenizer, context = load_tokenizer(one.home.folder), context_length(one.home.folder)
        unknown = getattr(tokenizer, "unk_token_id", None)
        kept = []
        for prompt in left:
            ids = encode_prompt(tokenizer, prompt.text, asked.chat)
            if context is not None and len(ids) + asked.tokens > context:
                skipped["longer than the context"] += 1
            elif sum(i == unknown for i in ids) > UNKNOWN * len(ids):
                skipped["not representable"] += 1
            else:
                kept.append(prompt)
        left = kept
    return left, {why: n for why, n in skipped.items() if n}


def encode_prompt(tokenizer: Any, text: str, chat: bool) -> Ids:
    """What the model is given."""
    if chat:
        turns = [{"role": "user", "content": text}]
        found = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return [int(i) for i in found["input_ids"]]
    from optimizer.data.text import text_start

    return (text_prefix(tokenizer) or text_start(tokenizer)[: not text]) + encode(tokenizer, text)


# ---------------------------------------------------------------- one entrant after the other


class _Job:
    """Prompts, and the reference that everybody is compared with."""

    def __init__(
        self, reference: Entrant, prompts: Sequence[Prompt], asked: Asked, store: Store, view: View
    ) -> None:
        self.reference, self.prompts, self.asked = reference, prompts, asked
        self.store, self.view = store, view
        self._teacher: Teacher | None = None
        self._own: dict[str, Any] = {}

    def key(self, what: str, identity: str) -> str:
        return digest(
            [
                what,
                VERSION,
                self.reference.identity,
                identity,
                [p.id for p in self.prompts],
                self.asked.tokens,
                self.asked.chat,
            ]
        )

    def of_reference(self) -> Written:
        """The reference's own texts; its loss is 0 by definition."""
        self._own = self.store.json(
            "written", self.key("reference", self.reference.identity), self._write_reference
        )
        rows = zip(self.prompts, self._own["ids"], self._own["texts"], strict=True)
        features = {p.id: self._shape(i, ids, text) for i, (p, ids, text) in enumerate(rows)}
        for i, prompt in enumerate(self.prompts):
            known = {"kl": 0.0, "tail": 0.0}
            features[prompt.id] |= known | ({"margin": 0.0} if i in self._separated else {})
        return Written(self._texts(self._own["texts"]), features)

    def twins(self) -> Written:
        """Of the first prompts only."""
        key = self.key(f"twins of {self.asked.twins}", self.reference.identity)
        kept = self.store.json("written", key, self._write_twins)
        some = self.prompts[: self.asked.twins]
        rows = zip(some, kept["ids"], kept["texts"], strict=True)
        features = {p.id: self._shape(i, ids, text) for i, (p, ids, text) in enumerate(rows)}
        texts = dict(zip((p.id for p in some), kept["texts"], strict=True))
        return Written(texts, features)

    def of(self, one: Entrant) -> Written:
        if one.identity == self.reference.identity:
            return self.of_reference()
        kept = self.store.json(
            "written", self.key("entrant", one.identity), lambda: self._write(one)
        )
        features = {}
        for i, prompt in enumerate(self.prompts):
            row = self._shape(i, kept["ids"][i], kept["texts"][i])
            if kept["kl"] is not None:
                row |= {"kl": kept["kl"][i], "tail": kept["tail"][i]}
                if i in self._separated:
                    row["margin"] = max(self._own["margins"][i] - kept["margins"][i], 0.0)
            features[prompt.id] = row
        return Written(self._texts(kept["texts"]), features)

    @property
    def _separated(self) -> set[int]:
        margins = self._own["margins"]
        return {i for i, m in enumerate(margins) if m is not None and m > SEPARATED}

    def _texts(self, texts: Sequence[str]) -> dict[str, str]:
        return {p.id: text for p, text in zip(self.prompts, texts, strict=True)}

    def _shape(self, i: int, ids: Ids, text: str) -> dict[str, float]:
        """Length and repetition of one text."""
        own = self._own["texts"][i]
        repeated = float(generation.repetition(np.array([ids]))[0]) if ids else 0.0
        return {"length": math.log((1 + len(text)) / (1 + len(own))), "repetition": repeated}

    # ------------------------------------------------------------ with a model

    def _write_reference(self) -> dict[str, Any]:
        with opened(self.reference, self.store, self.asked.device, self.view) as model:
            found = self._said(model, "the reference")
            return found | {"margins": self._margins(model)}

    def _write_twins(self) -> dict[str, Any]:
        with opened(self.reference, self.store, self.asked.device, self.view) as model:
            prompts, ids = (self._own[k][: self.asked.twins] for k in ("prompts", "ids"))
            return self._twins(model, prompts, ids)

    def _write(self, one: Entrant) -> dict[str, Any]:
        alike = one.home.fingerprint == self.reference.home.fingerprint
        teacher = self._teach() if alike else None
        with opened(one, self.store, self.asked.device, self.view) as model:
            found = self._said(model, one.name)
            found |= {"kl": None, "tail": None, "margins": None}
            if teacher is not None:
                found |= self._divergence(model, teacher) | {"margins": self._margins(model)}
        return found

    def _said(self, model: Open, name: str) -> dict[str, Any]:
        """Greedy texts of all prompts, with the tokens of both."""
        prompts = [encode_prompt(model.tokenizer, p.text, self.asked.chat) for p in self.prompts]
        ids = continued(model, prompts, self.asked.tokens, self.view, f"{name} writes")
        texts = [said(model.tokenizer, a, b) for a, b in zip(prompts, ids, strict=True)]
        return {"prompts": prompts, "ids": ids, "texts": texts}

    def _teach(self) -> Teacher:
        """The reference's predictions along its own texts, made once and only if they are needed."""
        from optimizer.metrics.divergence import Teacher
        from optimizer.models.head import OwnHead

        if self._teacher is None:
            with opened(self.reference, self.store, self.asked.device, self.view) as model:
                self.view.stage("the reference reads its texts")
                rows = [a + b for a, b in zip(self._own["prompts"], self._own["ids"], strict=True)]
                ids = np.zeros((len(rows), max(2, *map(len, rows))), np.int64)
                for i, row in enumerate(
                    rows
                ):  # padded on the right, which nothing looks back from
                    ids[i, : len(row)] = row
                windows = Windows(ids, np.arange(len(rows)))
                self._teacher = Teacher(model.net, windows, OwnHead(model.net))
        return self._teacher

    def _divergence(self, model: Open, teacher: Teacher) -> dict[str, Any]:
        self.view.stage("compared along the reference's texts")
        scores = teacher.score(model.net).kl
        means, tails = [], []
        for row, prompt, ids in zip(scores, self._own["prompts"], self._own["ids"], strict=True):
            kl = np.sort(row[len(prompt) - 1 : len(prompt) + len(ids) - 1].astype(np.float64))
            worst = kl[len(kl) - max(1, round(WORST * len(kl))) :]
            means.append(float(kl.mean()) if len(kl) else 0.0)
            tails.append(float(worst.mean()) if len(kl) else 0.0)
        return {"kl": means, "tail": tails}

    def _margins(self, model: Open) -> list[float | None]:
        """Of the probes among the prompts; None where there is none, or it can't be measured."""
        from optimizer.metrics import margins

        at = [i for i, prompt in enumerate(self.prompts) if prompt.pair is not None]
        pairs = [p.pair for p in self.prompts if p.pair is not None]
        jobs = margins.encode(pairs, model.tokenizer, context_length(self.reference.home.folder))
        use = [(i, job) for i, job in zip(at, jobs, strict=True) if not isinstance(job, str)]
        found: list[float | None] = [None] * len(self.prompts)
        if use:
            values = margins.measure(model.net, [job for _, job in use])
            for (i, _), value in zip(use, values.tolist(), strict=True):
                found[i] = value
        return found

    def _twins(self, model: Open, prompts: Sequence[Ids], ids: Sequence[Ids]) -> dict[str, Any]:
        begun, at = [], []
        for prompt, own in self.view.track(
            list(zip(prompts, ids, strict=True)), "where it is unsure"
        ):
            position, token = _second_choice(model.net, prompt, own)
            begun.append(prompt + own[:position] + [token])
            at.append(position)
        rest = continued(model, begun, self.asked.tokens, self.view, "its second choice")
        twins = [
            [*own[:position], start[-1], *more[: self.asked.tokens - position - 1]]
            for own, position, start, more in zip(ids, at, begun, rest, strict=True)
        ]
        texts = [said(model.tokenizer, a, b) for a, b in zip(prompts, twins, strict=True)]
        return {"ids": twins, "texts": texts}


def _second_choice(net: Any, prompt: Ids, own: Ids) -> tuple[int, int]:
    """Position in the text and token: where the two likeliest tokens were closest, the second."""
    import torch

    ids = torch.tensor([prompt + own], device=next(net.parameters()).device)
    with torch.inference_mode():
        logits = net(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logits = logits[: max(1, round(LATEST * len(own)))]
    if not len(logits):
        return 0, own[0] if own else prompt[-1]
    top = logits.topk(2, dim=-1)
    position = int((top.values[:, 0] - top.values[:, 1]).argmin())
    chosen = own[position]
    return position, int(next(i for i in top.indices[position].tolist() if i != chosen))


def continued(
    model: Open, prompts: Sequence[Ids], tokens: int, view: View, text: str
) -> list[Ids]:
    """Greedy continuations of at most `tokens` tokens, without the end token. Prompts of equal length
    run together, so that nothing is padded and nothing depends on its neighbours."""
    import torch

    net = model.net
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    batches = [
        rows[i : i + TOGETHER]
        for _, rows in sorted(by_length.items())
        for i in range(0, len(rows), TOGETHER)
    ]
    stops = ends(net)
    found: list[Ids] = [[] for _ in prompts]
    for batch in view.track(batches, text):
        ids = torch.tensor([prompts[i] for i in batch], device=next(net.parameters()).device)
        with torch.inference_mode():
            out = net.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                temperature=None,
                top_k=None,
                top_p=None,
                num_beams=1,
                repetition_penalty=1.0,
                max_new_tokens=tokens,
                pad_token_id=min(stops, default=0),
                past_key_values=model.cache(),
            )
        for i, row in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
            end = next((k for k, token in enumerate(row) if token in stops), len(row))
            found[i] = row[:end]
    return found


def ends(net: Any) -> set[int]:
    end = net.generation_config.eos_token_id
    return {int(i) for i in (end if isinstance(end, list) else [end]) if i is not None}


def said(tokenizer: Any, prompt: Ids, ids: Ids) -> str:
    """The text of the new tokens, with the space that it begins with; a character that the last token
    cuts in two is left out."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=True)
    text = (
        whole[len(before) :]
        if whole.startswith(before)
        else tokenizer.decode(ids, skip_special_tokens=True)
    )
    return str(text).rstrip("\ufffd")


def same(one: Mapping[str, str], other: Mapping[str, str], prompt: str) -> bool:
    """Whether a person would read the same text."""
    return one[prompt].strip() == other[prompt].strip()
