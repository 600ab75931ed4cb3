"""What can be set: a dataclass behind every command and every group of conf/, which checks itself."""

from optimizer.config.commands import Advise, Apply, Blur, Check, Evaluate, Export, Fit, Probe
from optimizer.config.folder import conf_folder, profile
from optimizer.config.optimize import AUTO, Nested, Optimize, Proof, Wandb

__all__ = [
    "AUTO",
    "Advise",
    "Apply",
    "Blur",
    "Check",
    "Evaluate",
    "Export",
    "Fit",
    "Nested",
    "Optimize",
    "Probe",
    "Proof",
    "Wandb",
    "conf_folder",
    "profile",
]
