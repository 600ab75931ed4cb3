"""What is said of a nested plan: both models on held-out text, and what nesting costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optimizer.cli.certificate import human
from optimizer.plan import Plan


def lines(plan: Plan) -> Iterator[str]:
    """Some sentences; nothing for a plan without a refinement."""
    section = plan.refinement
    if section is None:
        return
    total = plan.bytes["total"] + section.bytes["total"]
    yield (
        f"Refinement: planes for {len(section.layers)} layers, {human(section.bytes['total'])} more, "
        f"{human(total)} together. Predicted KL with them {section.predicted['kl']:.4f}."
    )
    proof = section.certificate
    if not proof:
        return
    yield (
        f"On held-out text: KL {_within(proof['kl']['base'])} by the base, "
        f"{_within(proof['kl']['refined'])} with the refinement; the refined model would keep "
        f"{100 * proof['acceptance']['value']:.1f} % of the base's words (unpack=draft)."
    )
    if "base over separate" in proof:
        yield (
            "Beside two separate plans of these sizes: "
            f"{_within(proof['base over separate'], 2)} times the KL by the base, "
            f"{_within(proof['refined over separate'], 2)} times refined."
        )
    hard = section.hard
    if hard:
        held = hard["heldout"]
        yield (
            f"unpack=hard share={hard['share']:g}: KL {_within(held['kl'])} with "
            f"{100 * held['share']:.1f} % of the tokens unpacked, those of largest {hard['signal']}."
        )


def _within(found: Mapping[str, Any], digits: int = 4) -> str:
    low, value, high = (f"{found[key]:.{digits}f}" for key in ("low", "value", "high"))
    return f"{value} [{low}, {high}]"
