"""A person in the loop: blind judgements of pairs of texts, chosen continuations, and an objective
learned from both.

    votes, prompts, entrants, writing, judging   what is asked, and what was answered
    statistics, reveal, learning                 what the answers say
    web, judge_page, overlay, overlay_page       the pages
    commands                                     judge, overlay, learn (printed by cli.person)
"""

from __future__ import annotations

from importlib.util import find_spec

from optimizer.errors import ConfigError

NEEDED = ("krippendorff", "starlette", "uvicorn")


def require() -> None:
    """Raise ConfigError unless the packages of the extra `person` are there."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"The commands judge, overlay and learn need {', '.join(missing)}. "
            "Run: pip install 'mezzotint[person]'"
        )
