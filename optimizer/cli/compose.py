"""How Hydra turns the files of conf/ into the dataclasses of `optimizer.config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimizer.config import Advise, Apply, Blur, Check, Evaluate, Export, Fit, Optimize, Probe
from optimizer.errors import ConfigError
from optimizer.search import credentials
from optimizer.store import write_atomically

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
}


def register() -> None:
    """Give Hydra the schemas, so that types and unknown keys are checked while it composes."""
    from hydra.core.config_store import ConfigStore

    for name, schema in COMMANDS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


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
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
