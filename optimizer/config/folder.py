"""Where conf/ lies, and what it says of engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimizer.formats.format import format_of
from optimizer.formats.runtime import Runtime

INSIDE, BESIDE = Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf"


def conf_folder() -> Path:
    """In a wheel conf/ lies inside the package, in a checkout beside it."""
    return INSIDE if INSIDE.is_dir() else BESIDE


def profile(name: str) -> Runtime:
    """The rules of an engine from conf/runtime/, or its format's own. Raises ConfigError."""
    from omegaconf import OmegaConf

    if not (conf_folder() / "runtime" / f"{name}.yaml").is_file():
        return format_of(name).runtime()
    values: Any = OmegaConf.to_container(
        OmegaConf.load(conf_folder() / "runtime" / f"{name}.yaml")
    )
    return Runtime(**values.get("runtime", values))
