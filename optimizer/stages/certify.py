"""What a certificate measures beside the held-out scores: the noise floor, domains, long greedy
text. Each is kept by content, so that a second proof of the same plan measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.certificate.tolerance import Tolerance
from optimizer.data import domains
from optimizer.data import text as data
from optimizer.data.domains import BUILT_IN, LONG, Domain
from optimizer.data.text import Windows
from optimizer.errors import ConfigError, ModelError
from optimizer.metrics import generation
from optimizer.metrics.blur import visible
from optimizer.models.source import context_length
from optimizer.plan import Plan, digest
from optimizer.plan.cache import WHOLE, CacheKind
from optimizer.plan.certificate import Evaluation, Greedy, Moved
from optimizer.stages.keys import (
    BeginningKey,
    CertifiedKey,
    CutKey,
    GreedyKey,
    LongKey,
    NoiseKey,
    ReadKey,
)
from optimizer.stages.session import Session

if TYPE_CHECKING:
    from optimizer.metrics.divergence import AnyScores, Scores, Teacher

NOISE_WINDOWS = 8  # enough for a floor
LONG_DOCUMENTS, LONG_TOKENS = 8, 1024  # sampled once per model
BEGINNING = 40  # characters by which a document is named

Hold = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Asked:
    """What `optimize` (proof.*) and `evaluate` ask alike. tuned: keys of domains that the plan was
    tuned on; of them, only the other documents are read."""

    tolerance: Tolerance
    domains: Sequence[str]
    generate: int
    seed: int
    tuned: Sequence[list[str]] = ()

    @property
    def texts(self) -> list[Domain]:
        chosen = domains.parse(self.domains)
        return [replace(d, half=1) if d.key() in self.tuned else d for d in chosen]


@dataclass(frozen=True)
class Weights:
    """A plan's weights. key: what determines them, None = keep nothing. hold: inside, the yielded
    network has them. cache: how keys and values are kept; see `optimizer.models.kv_cache`."""

    key: Any
    hold: Hold
    cache: CacheKind = WHOLE

    @property
    def identity(self) -> Any:
        return [self.key, astuple(self.cache)]


def check(session: Session, asked: Asked) -> None:
    """Everything that can be wrong, before anything expensive. Cuts the domains' texts."""
    if session.encoder:
        _check_encoder(session, asked)
        return
    context = context_length(session.source.folder)
    if context is not None and asked.generate >= context:
        raise ConfigError(
            f"Prompt and greedy text must fit the model's context of {context} tokens; generate is "
            f"{asked.generate}. Lower it."
        )
    skipped: dict[str, int] = {}
    left_out = []
    present = _present(session)
    for domain in asked.texts:
        if domain.path is None and (domain.name == LONG or domain.name in present):
            continue
        windows, reasons = _cut(session, domain)
        for reason, count in reasons.items():
            skipped[reason] = skipped.get(reason, 0) + count
        if windows is None:
            left_out.append(domain.name)
    if skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        whole = f"; left out whole: {', '.join(left_out)}" if left_out else ""
        session.view.note(f"Documents of domains that were skipped: {counts}{whole}.")


def _check_encoder(session: Session, asked: Asked) -> None:
    """An encoder's certificate has nothing of this. The default domains can't be told from asking
    for them, so they are left out with a word."""
    if asked.generate or tuple(asked.domains) not in ((), tuple(BUILT_IN)):
        raise ConfigError(
            f"{session.source.name} is an encoder: it writes no text, and its certificate has no "
            "domains, only batches of held-out texts. Leave out generate and domains; "
            "data=text data.path=FILE gives texts of your own."
        )
    session.view.note(
        "An encoder's certificate is about cosines and neighbours of held-out texts; domains and "
        "greedy text belong to language models and are left out."
    )


def certified(session: Session, plan: Plan) -> str:
    """Where the store keeps the held-out scores of a plan's joint rounding."""
    return CertifiedKey(plan.id, session.part_key("heldout"), plan.kv, plan.keep).text


def judge(session: Session, weights: Weights, heldout: AnyScores, asked: Asked) -> Evaluation:
    """`tolerance.judge` on everything that was asked for, and the comparison of greedy texts."""
    from optimizer.certificate import equivalence as tolerance
    from optimizer.certificate.wording import MAIN

    chosen = [] if session.encoder else asked.texts
    parts = _parts(session, heldout, chosen)
    others = [domain for domain in chosen if domain.name not in parts]
    texts: dict[str, AnyScores] = {
        MAIN: heldout,
        **parts,
        **_domain_scores(session, weights, others),
    }
    cuts = {domain.name: domain.weight for domain in chosen}
    found = tolerance.judge(texts, cuts, _noise(session), asked.tolerance, asked.seed, parts)
    named = [replace(one, begins=_beginning(session, others, one)) for one in found.documents]
    greedy = _greedy(session, weights, asked) if asked.generate else None
    return replace(found, documents=named, greedy=greedy)


def _parts(
    session: Session, heldout: AnyScores, chosen: Sequence[Domain]
) -> Mapping[str, AnyScores]:
    """The held-out scores by kind of text, where the held-out text has the built-in kinds: they need
    no reading of their own."""
    from optimizer.metrics.divergence import Scores

    kinds = np.array(session.windows("heldout").domains)
    if not kinds.size or not isinstance(heldout, Scores):
        return {}
    names = [domain.name for domain in chosen if domain.path is None]
    return {name: heldout.only(kinds == name) for name in names if (kinds == name).any()}


def _present(session: Session) -> set[str]:
    """Built-in kinds of text of which the held-out windows consist."""
    if session.data.source != "bundled" or session.bundled is None:
        return set()
    return set(session.bundled["heldout"].domains)


def _noise(session: Session) -> dict[str, AnyScores]:
    from optimizer.metrics import divergence
    from optimizer.metrics.divergence import stored

    def make() -> dict[str, np.ndarray]:
        few = session.windows("heldout").head(NOISE_WINDOWS)
        session.view.stage("the reference against itself")
        found = divergence.teacher(session.model, few, own_head=True).noise(session.model.net)
        return {f"{n}/{k}": v for n, scores in found.items() for k, v in scores.arrays().items()}

    key = NoiseKey(NOISE_WINDOWS, session.part_key("heldout"), session.device).text
    kept = session.store.arrays("scores", key, make)
    assert kept is not None
    names = dict.fromkeys(name.rpartition("/")[0] for name in sorted(kept, reverse=True))
    return {
        name: stored(
            {k.rpartition("/")[2]: v for k, v in kept.items() if k.startswith(f"{name}/")}
        )
        for name in names
    }


# ---------------------------------------------------------------- domains


def _cut(session: Session, domain: Domain) -> tuple[Windows | None, dict[str, int]]:
    """From the store or cut now; the tokenizer is needed only then."""
    longest = session.data.heldout.length
    own = session.data.key("") if session.data.source == "text" else ""
    key = CutKey(domains.VERSION, session.source.fingerprint, domain.key(), longest, own).text

    def make() -> dict[str, Any]:
        from optimizer.models.tokenizer import load_tokenizer

        cut = domains.cut(domain, load_tokenizer(session.source.folder), longest, session.data)
        made = cut.windows
        ids = None if made is None else made.ids.tolist()
        owners = [] if made is None else made.documents.tolist()
        return {"ids": ids, "documents": owners, "skipped": cut.skipped}

    kept = session.store.json("domains", key, make)
    if kept["ids"] is None:
        return None, kept["skipped"]
    windows = Windows(np.array(kept["ids"]), np.array(kept["documents"]))
    return windows, kept["skipped"]


def _sampled(session: Session) -> Windows:
    """`long`: what the reference itself says, as long as its context, LONG_TOKENS at most."""
    from optimizer.stages.tokens import LazyModel

    length = min(context_length(session.source.folder) or LONG_TOKENS, LONG_TOKENS)
    key = LongKey(data.VERSION, session.source.fingerprint, length, session.data.seed).text

    def make() -> dict[str, np.ndarray]:
        session.view.stage("sampling long text from the reference")
        seed = [session.data.seed, 83]
        return data.generate(LazyModel(session), LONG_DOCUMENTS, length, seed)

    kept = session.store.arrays("tokens", key, make)
    assert kept is not None
    return Windows(kept["ids"], np.arange(LONG_DOCUMENTS))


def _windows(session: Session, domain: Domain) -> Windows | None:
    if domain.name == LONG and domain.path is None:
        return _sampled(session)
    return _cut(session, domain)[0]


def _domain_scores(
    session: Session, weights: Weights, chosen: Sequence[Domain]
) -> dict[str, Scores]:
    from optimizer.metrics.divergence import Scores

    windows = {domain.name: _windows(session, domain) for domain in chosen}
    present = {name: cut for name, cut in windows.items() if cut is not None}
    keys = {name: _key(session, weights, cut) for name, cut in present.items()}
    kept = {name: _kept(session, key) for name, key in keys.items()}
    missing = {name: cut for name, cut in present.items() if kept[name] is None}
    for name, scores in _measured(session, weights, missing).items():
        key = keys[name]
        kept[name] = scores.arrays()
        if key is not None:
            session.store.arrays("scores", key, scores.arrays)
    found = {name: Scores(**arrays) for name, arrays in kept.items() if arrays is not None}
    return {
        name: scores.after((scores.kl.shape[1] + 1) // 2) if _is_long(chosen, name) else scores
        for name, scores in found.items()
    }


def _is_long(chosen: Sequence[Domain], name: str) -> bool:
    """Of long text, the second half is what needs a long context."""
    return any(domain.name == name == LONG and domain.path is None for domain in chosen)


def _measured(
    session: Session, weights: Weights, missing: Mapping[str, Windows]
) -> dict[str, Scores]:
    from optimizer.metrics.divergence import Teacher
    from optimizer.models.kv_cache import rounded

    if not missing:
        return {}
    teachers: dict[str, Teacher] = {
        name: Teacher(session.model.net, cut, session.model.own_head)
        for name, cut in session.view.track(list(missing.items()), "the reference reads domains")
    }
    with weights.hold() as net, rounded(net, weights.cache):
        return {
            name: teacher.score(net)
            for name, teacher in session.view.track(
                list(teachers.items()), "the plan reads domains"
            )
        }


def _key(session: Session, weights: Weights, windows: Windows) -> str | None:
    if weights.key is None:
        return None
    ids = [list(windows.ids.shape), digest(windows.ids.tolist())]
    return ReadKey(session.source.fingerprint, ids, weights.identity).text


def _kept(session: Session, key: str | None) -> dict[str, np.ndarray] | None:
    return None if key is None else session.store.arrays("scores", key)


def _beginning(session: Session, chosen: Sequence[Domain], one: Moved) -> str:
    """The first words of a document, to find it again, control characters as their pictures; its first
    tokens' numbers where the model has no tokenizer."""
    domain = next((d for d in chosen if d.name == one.text), None)
    windows = session.windows("heldout") if domain is None else _windows(session, domain)
    assert windows is not None
    ids = [i for i in windows.ids[one.window][:40].tolist() if i >= 0]  # an encoder's padding

    def make() -> str:
        from optimizer.models.tokenizer import load_tokenizer

        try:
            text = load_tokenizer(session.source.folder).decode(ids, skip_special_tokens=True)
        except ModelError:
            return f"tokens {', '.join(map(str, ids))}"[:BEGINNING]
        return " ".join(str(text).replace('"', "'").split())[:BEGINNING]

    key = BeginningKey(session.source.fingerprint, ids).text
    return visible(str(session.store.json("beginnings", key, make)))


# ---------------------------------------------------------------- long greedy text


def _greedy(session: Session, weights: Weights, asked: Asked) -> Greedy:
    context = context_length(session.source.folder)
    begun = generation.prompts(session.windows("heldout"), context, asked.generate)
    base = GreedyKey(session.source.fingerprint, begun.tolist(), asked.generate)

    def said(who: str, own: Weights) -> dict[str, np.ndarray]:
        from optimizer.models.kv_cache import BITS, Cache

        session.view.stage(f"{who} writes {len(begun)} texts of {asked.generate} tokens")
        with own.hold() as net:
            cache = Cache(net.config, own.cache) if own.cache.bits in BITS else None
            return {"ids": generation.continuations(net, begun, asked.generate, cache)}

    reference = session.store.arrays(
        "tokens", base.text, lambda: said("the reference", _own(session))
    )
    assert reference is not None
    if weights.key is None:
        other: dict[str, np.ndarray] | None = said("the plan", weights)
    else:
        key = replace(base, weights=weights.identity).text
        other = session.store.arrays("tokens", key, lambda: said("the plan", weights))
    assert other is not None
    return generation.compare(reference["ids"], other["ids"], asked.seed)


def _own(session: Session) -> Weights:
    return Weights(None, lambda: nullcontext(session.model.net))
