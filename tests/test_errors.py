"""What a user is told stays a paragraph."""

from __future__ import annotations

from optimizer.errors import LONGEST, ConfigError


def test_a_message_keeps_its_rule_and_its_remedy_however_long_a_name_is() -> None:
    said = str(ConfigError(f"A name is short, and {'x' * 10**5} isn't. Take another."))
    assert len(said) < LONGEST
    assert said.startswith("A name is short, and xxx") and said.endswith(
        "xxx isn't. Take another."
    )
    assert str(ConfigError("y" * LONGEST)) == "y" * LONGEST
