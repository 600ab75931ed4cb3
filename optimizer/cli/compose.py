"""How Hydra turns the files of conf/ into the dataclasses of `optimizer.config`."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from optimizer.cli import words
from optimizer.commands.generate import Generate
from optimizer.config import (
    Advise,
    Apply,
    Blur,
    Check,
    Evaluate,
    Export,
    Fit,
    Optimize,
    Probe,
    conf_folder,
)
from optimizer.errors import ConfigError, MezzotintError
from optimizer.formats.format import formats
from optimizer.metrics.objective import Meaning
from optimizer.person.settings import Judge, Learn, Overlay
from optimizer.quantization.methods import method, methods
from optimizer.search import credentials
from optimizer.sensitivity import estimator, estimators
from optimizer.store import unwritable, write_atomically

# groups whose type depends on a name: the key that holds it, all classes, and the one of a name
METHODS: dict[str, tuple[str, Callable[[], dict[str, Any]], Callable[[Any], Any]]] = {
    "quantizer": ("name", methods, method),
    "sensitivity": ("estimator", estimators, estimator),
}
COMMANDS: dict[str, type[Any]] = {
    "optimize": Optimize,
    "apply": Apply,
    "evaluate": Evaluate,
    "export": Export,
    "check": Check,
    "fit": Fit,
    "advise": Advise,
    "probe": Probe,
    "blur": Blur,
    "generate": Generate,
    "judge": Judge,
    "overlay": Overlay,
    "learn": Learn,
}


def objective(words: list[str]) -> list[str]:
    """Words of the command line in which `meaning=FILE` became what the file says; a name of conf/ is
    left. Raises ConfigError."""
    found = []
    for word in words:
        file = word.removeprefix("meaning=").strip("'\"")
        named = file.endswith((".yaml", ".yml")) or "/" in file
        if not word.startswith("meaning=") or not named:
            found.append(word)
            continue
        for key, value in asdict(Meaning.load(file)).items():
            found.append(f"meaning.{key}={json.dumps(value, ensure_ascii=False)}")
    return found


def register(command: str) -> None:
    """Give Hydra the command's schema, so that types and unknown keys are checked while it composes,
    and the methods of other packages as choices of their group."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    schema = OmegaConf.structured(COMMANDS[command])
    if COMMANDS[command] is Optimize:  # their types depend on their names, see `build`
        schema.quantizer, schema.sensitivity = {}, {}
    store.store(name=f"{command}_schema", node=schema)
    for name, form in formats().items():
        if not (conf_folder() / "runtime" / f"{name}.yaml").is_file():
            store.store(group="runtime", name=name, node=form().runtime())
    for group, (key, classes, _) in METHODS.items():
        for name, made in classes().items():
            if not (conf_folder() / group / f"{name}.yaml").is_file():
                values: Any = OmegaConf.to_container(OmegaConf.structured(made))
                store.store(group=group, name=name, node={**values, key: name})


def hide_passwords(cfg: Any) -> None:
    """Take the password out of Hydra's own files, which lie in a run's folder before the run begins;
    it is there if it came from a file of settings. From here on it is known to `credentials`."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    address = OmegaConf.select(cfg, "search.storage", throw_on_resolution_failure=False)
    if not isinstance(address, str) or credentials.hidden(address) == address:
        return
    hydra = HydraConfig.get()
    written = list(Path(hydra.runtime.output_dir).glob(f"{hydra.output_subdir or '.'}/*.yaml"))
    if hydra.mode == RunMode.MULTIRUN:
        written += Path(hydra.sweep.dir).glob("*.yaml")
    for file in written:
        credentials.clean_file(file, write_atomically)


def build(command: str, cfg: Any) -> Any:
    """A composed configuration -> its dataclass. Raises ConfigError for missing values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(
            f"`mezzotint {command}` needs {', '.join(missing)}. Add for example {missing[0]}=..."
        )
    try:
        if COMMANDS[command] is not Optimize:
            return OmegaConf.to_object(cfg)
        made = {group: _method(group, cfg[group]) for group in METHODS}
        settings: Any = OmegaConf.to_object(cfg)
        return replace(settings, **made)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None


def _method(group: str, cfg: Any) -> Any:
    """What a group says -> the dataclass that its name stands for."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, _, find = METHODS[group]
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    made = find(values.pop(key, next(iter(METHODS[group][1]()))))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(made), values))
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0]
        where = f"{group}.{error.full_key}" if getattr(error, "full_key", None) else group
        known = ", ".join(f.name for f in fields(made) if f.init)
        raise ConfigError(f"{where}: {said}. {made.__name__} has {known}.") from None


# ---------------------------------------------------------------- Hydra


class JobError(Exception):
    """A fault of the program in a launcher's process, with its traceback."""


def keys(command: str) -> list[str]:
    """Names of the command's settings."""
    return [field.name for field in fields(COMMANDS[command])]


def run(command: str, asked: list[str], job: Callable[[Any], None]) -> list[MezzotintError]:
    """Compose the settings and do the job with each of them; returns what went wrong in jobs. Raises
    ConfigError for what Hydra can't compose."""
    import hydra
    from hydra.errors import HydraException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print a traceback and exit with 1
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's own: pages of 2 MB
    register(command)
    failures: list[MezzotintError] = []
    busy, here = False, os.getpid()

    def task(cfg: Any) -> None:
        nonlocal busy
        busy = True
        try:
            hide_passwords(cfg)
            job(build(command, cfg))
        except MezzotintError as error:
            if os.getpid() != here:  # a launcher's process, whose list nobody reads
                raise
            failures.append(error)  # passing through Hydra it would print more lines
        except Exception:
            if os.getpid() != here:
                raise JobError(traceback.format_exc()) from None
            raise
        busy = False

    asked = words.flags_first(asked)
    _check_flags(command, asked)
    before = sys.argv
    sys.argv = [f"mezzotint {command}", *map(credentials.clean_argument, asked)]
    try:
        with _printed_clean(asked):
            hydra.main(str(conf_folder()), command, version_base="1.3")(task)()
    except (MezzotintError, JobError):
        raise
    except SystemExit:  # of argparse, after --help and its like
        pass
    except Exception as error:
        if busy:
            raise
        if isinstance(error, OSError) and not isinstance(error, HydraException):
            raise unwritable(Path(error.filename or "The run's folder"), error) from None
        raise ConfigError(_explained(command, asked, error)) from None
    finally:
        sys.argv = before
    return failures


def _check_flags(command: str, asked: list[str]) -> None:
    """Raises ConfigError where Hydra's argparse would print its usage and leave."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> None:
        raise ConfigError(f"{message[:1].upper()}{message[1:300]}. {_try(command)}")

    parser = get_args_parser()
    parser.error = refuse
    parser.parse_args(asked)


@contextmanager
def _printed_clean(asked: list[str]) -> Iterator[None]:
    """What Hydra prints when it is asked for the settings themselves, without passwords."""
    if not {"--cfg", "-c", "--info", "-i"} & {word.split("=")[0] for word in asked}:
        yield
        return
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    finally:
        sys.stdout.write(credentials.clean(said.getvalue()))


def _try(command: str) -> str:
    return f"`mezzotint {command} --cfg job` prints every key with its value."


def _explained(command: str, asked: list[str], error: Exception) -> str:
    """What Hydra says of settings, whatever it raises: it knows most mistakes, and passes others on
    as Python's own errors."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    preset = re.search(r"Could not find '(\w+)/([^']*)'", str(error))
    if preset:
        return _no_preset(*preset.groups())
    known = isinstance(error, HydraException | OmegaConfBaseException)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if error.__cause__ is not None:
        lines += [line.strip() for line in str(error.__cause__).splitlines()[:1]]
    seen = dict.fromkeys(line for line in lines if "+" not in line and "_type" not in line)
    said = " ".join(seen)[:600]
    if not known:
        overrides = " ".join(word[:80] for word in asked if "=" in word)
        said = f"These settings can't be composed ({said or type(error).__name__}): {overrides}."
    unknown = re.search(r"Could not override '([^']*)'\.? Key '\w+' not in", said)
    if unknown:
        return f"`mezzotint {command}` has no setting {unknown[1]}. {_try(command)}"
    return " ".join(part for part in (said, words.advice(asked), _try(command)) if part)


def _no_preset(group: str, name: str) -> str:
    from difflib import get_close_matches

    names = sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
    near = get_close_matches(name, names, n=4, cutoff=0.5)
    near += [other for other in names if name[:3] and other.startswith(name[:3])]
    text = f"There is no preset {group}={name[:60]}."
    if near:
        text += f" Near names: {', '.join(list(dict.fromkeys(near))[:6])}."
    return f"{text} All of them: {', '.join(names)}."
