"""A session's token windows, made once and kept under a content key: read from files or from the texts
that come with the program, or sampled from the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.data.text import Tokens, Windows
from optimizer.errors import ModelError, TextError
from optimizer.stages.keys import BundledKey, TokensKey

if TYPE_CHECKING:
    from optimizer.stages.session import Session


def made(session: Session) -> Tokens:
    """Of each part that the session's data asks for."""
    from optimizer.data import text as texts

    data = session.data

    def keep(name: str, make: Any) -> dict[str, np.ndarray]:
        key = TokensKey(texts.VERSION, session.source.fingerprint, name).text
        found = session.store.arrays("tokens", key, make)
        assert found is not None
        return found

    def cut() -> dict[str, np.ndarray]:
        from optimizer.models.tokenizer import load_tokenizer

        said: list[str] = []
        parts = texts.cut(data, load_tokenizer(session.source.folder), said.append)
        found = {
            f"{name}.{k}": v
            for name, w in parts.items()
            for k, v in (("ids", w.ids), ("documents", w.documents))
        }
        return found | {"said": np.frombuffer("\n".join(said).encode(), np.uint8)}

    if session.encoder:
        return _short(session, keep)
    if data.source == "bundled":
        if session.bundled is not None:
            return session.bundled
    elif data.source != "self":
        kept = keep(session.tokens_key, cut)
        if "said" in kept and kept["said"].size:
            session.view.note(kept["said"].tobytes().decode())
        return {
            name: Windows(kept[f"{name}.ids"], kept[f"{name}.documents"]) for name in data.parts
        }

    return texts.sample(data, LazyModel(session), keep, session.view.track)


def bundled(session: Session) -> Tokens | None:
    """The texts that come with the program; None, with a word, where the model can't read them,
    or where there are fewer than a part asks for by default."""
    from optimizer.data import domains

    def cut() -> dict[str, Any]:
        from optimizer.models.tokenizer import load_tokenizer

        try:
            parts = domains.bundled(session.data, load_tokenizer(session.source.folder))
        except (ModelError, TextError) as error:
            return {"why": str(error)}
        return {
            name: {
                "ids": w.ids.tolist(),
                "documents": w.documents.tolist(),
                "domains": w.domains,
            }
            for name, w in parts.items()
        }

    key = BundledKey(domains.VERSION, domains.content(), session.tokens_key).text
    kept = session.store.json("tokens", key, cut)
    if "why" in kept:
        session.view.note(f"{kept['why']} So text is sampled from the model instead.")
        return None
    return {
        name: Windows(
            np.array(w["ids"], np.int64),
            np.array(w["documents"], np.int64),
            tuple(w["domains"]),
        )
        for name, w in kept.items()
    }


def _short(session: Session, keep: Callable[[str, Any], dict[str, np.ndarray]]) -> Tokens:
    """Batches of texts for an encoder, and a word on those that were left out or cut."""
    from optimizer.data import short_texts as texts

    def cut() -> dict[str, np.ndarray]:
        from optimizer.models.tokenizer import load_tokenizer

        found = texts.cut(session.data, load_tokenizer(session.source.folder))
        ids = {name: windows.ids for name, windows in found.parts.items()}
        return ids | {"news": np.array([found.texts, found.shortened, found.skipped])}

    kept = keep(f"{session.tokens_key} texts {texts.VERSION}", cut)
    session.view.note(texts.told(*kept["news"].tolist()))
    return {
        name: Windows(ids, np.arange(len(ids))) for name, ids in kept.items() if name != "news"
    }


class LazyModel:
    """Stands for the session's model, loaded at the first use: stored batches don't need it."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def net(self) -> Any:
        return self._session.model.net
