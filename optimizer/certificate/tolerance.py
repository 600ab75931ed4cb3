"""Up to where a plan counts as the reference."""

from __future__ import annotations

from dataclasses import dataclass

from optimizer.errors import ConfigError


@dataclass(kw_only=True)
class Tolerance:
    """Up to where a plan counts as the reference. kl: mean nats per token; .004 is three times what
    uniform 8 bits cost SmolLM2-135M (.0012). flips: share of tokens at which another token is the
    most probable; a mean KL of .004 allows a mean total variation of .045 (Pinsker), hence .05.
    accuracy: change, either way, of the share of true next tokens that are the most probable."""

    kl: float = 0.004
    flips: float = 0.05
    accuracy: float = 0.01

    def check(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < 1:
                raise ConfigError(
                    f"proof.tolerance.{name} lies between 0 and 1 (nothing can be shown to be "
                    f"exactly the same), not {value}."
                )
