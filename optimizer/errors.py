"""Everything that Mezzotint raises on purpose.

MezzotintError             a user can act on it: says the rule, the value, the remedy; exit code 2
├── ConfigError            a key, a value or a combination in the configuration
├── ModelError             the reference can't be loaded, or its weights aren't finite
├── TextError              no text, too little text, text that can't be read
├── BudgetError            no plan fits
├── PlanError              a plan that is damaged, or that belongs to another model
├── StorageError           the disk: full, read-only, damaged entries
└── ProcessError           another process of the same job; without words where that one tells them
"""

from __future__ import annotations

LONGEST = 4000  # characters of a message


class MezzotintError(Exception):
    """Base of the tree; `str(error)` is one paragraph for a person, however long a name or a value in
    it is: the middle is left out."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= LONGEST:
            return text
        return f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"


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


class ProcessError(MezzotintError):
    pass
