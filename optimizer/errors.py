"""Everything that Mezzotint raises on purpose.

MezzotintError             a user can act on it: says the rule, the value, the remedy; exit code 2
├── ConfigError            a key, a value or a combination in the configuration
├── ModelError             the reference can't be loaded, or its weights aren't finite
├── TextError              no text, too little text, text that can't be read
├── BudgetError            no plan fits
├── PlanError              a plan that is damaged, or that belongs to another model
└── StorageError           the disk: full, read-only, damaged entries
"""

from __future__ import annotations


class MezzotintError(Exception):
    """Base of the tree; `str(error)` is one paragraph for a person."""


class ConfigError(MezzotintError):
    pass


class ModelError(MezzotintError):
    pass


class TextError(MezzotintError):
    pass


class BudgetError(MezzotintError):
    pass


class PlanError(MezzotintError):
    pass


class StorageError(MezzotintError):
    pass
