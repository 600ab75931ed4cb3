"""A model's tokenizer, whose failures are one sentence.

The tokenizers library raises bare exceptions, and panics that are no Exception at all, for
vocabularies that lack a piece; a chat template is a program of its author's, which may fail, or run
without an end.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from optimizer.errors import ModelError
from optimizer.models.source import quiet

SECONDS = 10.0  # for one chat; templates of published models take about a millisecond
OURS = (KeyboardInterrupt, SystemExit, MemoryError)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, of its own class, guarded. Raises ModelError if it has none."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            own = AutoTokenizer.from_pretrained(folder)
    except BaseException as error:
        if isinstance(error, OURS):
            raise
        raise ModelError(
            f"A text needs a tokenizer, and {folder} has none that can be read ({_said(error)}). Save "
            "it there, or take data=self, which needs no text."
        ) from None
    kind = type(own)
    own.__class__ = type(kind.__name__, (Guarded, kind), {})
    return own


class Guarded:
    """Before a tokenizer's class: what it raises is a ModelError."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._asked("__call__", *given, **named)

    def decode(self, *given: Any, **named: Any) -> Any:
        return self._asked("decode", *given, **named)

    def apply_chat_template(self, *given: Any, **named: Any) -> Any:
        """Raises what the template raises, and ModelError if it takes longer than SECONDS."""
        own: Any = super()
        return within(SECONDS, lambda: own.apply_chat_template(*given, **named))

    def _asked(self, method: str, *given: Any, **named: Any) -> Any:
        try:
            return getattr(super(), method)(*given, **named)
        except BaseException as error:
            if isinstance(error, OURS):
                raise
            raise ModelError(
                f"The tokenizer in {getattr(self, 'name_or_path', 'the folder')} can't read or write "
                f"text ({type(error).__name__}: {_said(error)}). Save one that fits the model there, "
                "or take data=self, which needs no text."
            ) from None


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


class _Stopped(BaseException):
    """Raised inside the thread that takes too long."""


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns or raises. ModelError if it takes longer; it is then stopped where Python
    next runs a line of it, and until then goes on by itself."""
    kept: dict[str, Any] = {}

    def run() -> None:
        try:
            kept["found"] = work()
        except BaseException as error:  # noqa: BLE001  handed on below
            kept["error"] = error

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        at = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(at, ctypes.py_object(_Stopped))
        thread.join(1.0)
        raise ModelError(
            f"The tokenizer's chat template takes more than {seconds:g} seconds for one chat, perhaps "
            "without an end. Correct chat_template in the model's folder, or take data.template=false."
        )
    if "error" in kept:
        raise kept["error"]
    return kept["found"]
