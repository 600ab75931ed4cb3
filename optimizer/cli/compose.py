"""How Hydra turns the files of conf/ into the dataclasses of `optimizer.config`."""

from __future__ import annotations

from typing import Any

from optimizer.config import Apply, Blur, Check, Evaluate, Export, Fit, Optimize, Probe
from optimizer.errors import ConfigError

COMMANDS: dict[str, type[Any]] = {
    "optimize": Optimize,
    "apply": Apply,
    "evaluate": Evaluate,
    "export": Export,
    "check": Check,
    "fit": Fit,
    "probe": Probe,
    "blur": Blur,
}


def register() -> None:
    """Give Hydra the schemas, so that types and unknown keys are checked while it composes."""
    from hydra.core.config_store import ConfigStore

    for name, schema in COMMANDS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


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
