"""A GGUF file -> a model folder in the transformers layout, dequantized, by transformers itself."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.errors import ModelError
from optimizer.models import gguf_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what transformers and gguf raise for files that they can't read
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    IndexError,
    TypeError,
    struct.error,
)

# llama.cpp names its pre-tokenizers; these split every digit off, and transformers' GGUF loader
# forgets it ("a  12" would be cut otherwise than in training).
SPLITS_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers parses a GGUF file anew for its config, weights and tokenizer, and has gguf make
    its table of names once a module: most of the time that a small model's conversion took."""
    import gguf

    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    parse = functools.cache(own["GGUFReader"])
    names = functools.cache(own["get_tensor_name_map"])
    try:
        vars(gguf).update(GGUFReader=lambda path: parse(Path(path)), get_tensor_name_map=names)
        yield
    finally:
        vars(gguf).update(own)


@_read_once()
def convert(gguf: Path, folder: Path) -> None:
    """GGUF -> transformers folder in fp16; llama.cpp's blocks hold fp16 scales. Raises ModelError.
    Memory: the model in fp16, and the file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, str] = {"gguf_file": gguf.name}
    try:
        with redirect_stderr(StringIO()):  # a bar of tqdm's own, which nothing switches off
            loaded = AutoModelForCausalLM.from_pretrained(
                gguf.parent, dtype=torch.float16, **where
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    except UNREADABLE as error:
        raise ModelError(
            f"{gguf} couldn't be read as a GGUF language model ({error}). It may be cut off, or "
            "of an architecture that transformers doesn't convert; give the original folder."
        ) from None
    gguf_metadata.mend(loaded.config, gguf_metadata.read(gguf))
    _split_digits(tokenizer, gguf)
    del loaded.config.quantization_config  # it is dequantized; a fresh model forgets that it was
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float16)
    halves = {name: value.half() for name, value in loaded.state_dict().items()}
    net.load_state_dict(halves, assign=True)
    net.tie_weights()
    net.generation_config = loaded.generation_config
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Steps

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() in SPLITS_DIGITS:
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Steps(steps)
