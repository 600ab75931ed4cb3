"""The README.md of an exported folder: what it is, how it was made, what was lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from optimizer.certificate.wording import LABELS, in_unit, unit_of
from optimizer.formats.rules import Verdict
from optimizer.plan import Plan


def card(plan: Plan, verdict: Verdict, run: str) -> str:
    """Markdown. run: how a person starts the engine."""
    name = str(plan.model["name"])
    lines = [
        f"# {name}, quantized by a plan",
        "",
        f"{verdict.bytes} bytes of weights for {verdict.engine}; "
        f"{plan.effective_bits:.3f} bits per weight over {len(plan.scope)} layers. Made by Mezzotint "
        f"{plan.provenance.get('versions', {}).get('mezzotint', '')} from plan {plan.id}.",
        "",
        "```",
        run,
        "```",
        "",
        "## How it was made",
        "",
        f"- reference: {name}, `{plan.model.get('fingerprint', 'unknown')}`",
        f"- quantizer: {plan.quantizer.get('name', 'unknown')}",
        f"- command: `{plan.provenance.get('command', 'unknown')}`",
        f"- runtime of the plan: {plan.runtime}",
        "",
        "| precision | layers | stored as |",
        "| --- | ---: | --- |",
    ]
    for key, count in sorted(Counter(plan.layers.values()).items()):
        stored = "16 bits, untouched" if key == "none" else verdict.stored.get(key, key)
        lines.append(f"| {key} | {count} | {stored} |")
    lines += ["", "## What was lost", "", *_loss(plan)]
    if verdict.readers:
        lines += ["", "## Read back", "", *(f"- {reader}" for reader in verdict.readers)]
    if verdict.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in verdict.notes)]
    lines += [
        "",
        "`plan.json` holds the whole plan with its certificate, `manifest.json` the sha256 of every "
        "file. After writing, every quantized weight was read back and compared with the plan's.",
    ]
    return "\n".join(lines) + "\n"


def _loss(plan: Plan) -> list[str]:
    promise = plan.predicted
    unit = unit_of(promise)
    lines = [
        f"Predicted: KL {promise['kl']:.4f} +- {promise['stderr']:.4f} nats per {unit} from the "
        "reference."
    ]
    proof: Mapping[str, Any] = plan.certificate
    if not proof:
        return [*lines, "", "Not measured on held-out text."]
    row = next(r for r in proof["rows"] if r["name"] == "plan")
    lines += [
        "",
        in_unit(
            f"Measured on {proof['documents']} held-out documents ({proof['tokens']} tokens), "
            f"{proof['interval']}, with the weights of this folder in fp32 arithmetic:",
            unit,
        ),
        "",
        "| measure | value | interval |",
        "| --- | ---: | ---: |",
    ]
    for key, label in {**LABELS[unit], "perplexity_reference": "perplexity, reference"}.items():
        if key not in row:
            continue
        cell = row[key]
        lines.append(
            f"| {label} | {cell['value']:.4f} | {cell['low']:.4f} to {cell['high']:.4f} |"
        )
    answer = proof.get("meaning", {}).get("verdict")
    return [*lines, "", *([str(answer), ""] if answer else []), str(proof["verdict"])]
