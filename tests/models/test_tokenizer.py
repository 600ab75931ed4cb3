"""A tokenizer that fails is one sentence, and a template that never ends is stopped."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ReformerConfig

from optimizer.data.documents import by_template
from optimizer.errors import ModelError, TextError
from optimizer.models import tokenizer
from optimizer.models.tokenizer import load_tokenizer, within

CHAT = [{"role": "user", "content": "Hi"}]
ENDLESS = "{% for n in range(99999) %}" * 3 + "{% endfor %}" * 3


def words(folder: Path, template: str) -> Path:
    """A tokenizer of three words."""
    own = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


def test_it_is_what_transformers_loads(tmp_path: Path) -> None:
    found = load_tokenizer(words(tmp_path, "{{ messages[0]['content'] }}!"))
    assert isinstance(found, PreTrainedTokenizerFast)
    assert found("a b c")["input_ids"] == [1, 2, 0]
    assert found.decode([2, 1]) == "b a"
    assert found.apply_chat_template(CHAT, tokenize=False) == "Hi!"
    found.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again")("b")["input_ids"] == [2]


def test_an_exception_of_the_tokenizers_library_is_a_sentence(tmp_path: Path) -> None:
    """transformers makes Reformer a tokenizer of no words out of nothing."""
    ReformerConfig().save_pretrained(tmp_path)
    empty = load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=r"can't read or write text.*not found.*data=self"):
        empty("a")


def test_a_template_without_an_end_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "SECONDS", 0.3)
    speak = by_template(load_tokenizer(words(tmp_path, ENDLESS)))
    start = time.monotonic()
    with pytest.raises(TextError, match=r"more than 0\.3 seconds.*data\.template=false"):
        speak(CHAT)
    assert time.monotonic() - start < 5


def test_what_takes_too_long_is_not_left_running() -> None:
    counted = [0]

    def work() -> None:
        while True:
            counted[0] += 1

    with pytest.raises(ModelError):
        within(0.1, work)
    before = counted[0]
    time.sleep(0.2)
    assert 0 < counted[0] == before


def test_what_a_template_raises_is_handed_on(tmp_path: Path) -> None:
    speak = by_template(load_tokenizer(words(tmp_path, "{{ raise_exception('no user turns') }}")))
    with pytest.raises(TextError, match="no user turns"):
        speak(CHAT)
