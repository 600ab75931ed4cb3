"""The README.md of an exported folder: what it is, how it was made, what was lost."""

from __future__ import annotations

import re
from collections import Counter
from html import escape
from typing import Any

from optimizer import untrusted
from optimizer.certificate.wording import in_unit
from optimizer.formats.rules import Verdict
from optimizer.plan import Plan
from optimizer.plan.measures import measure, unit_measures

# has a meaning in Markdown: anywhere, or at the beginning of a line
MEANT = re.compile(r"[\\`*{}\[\]|~]|(?<!\w)_|_(?!\w)|^[#+=:>-]")


def inline(text: Any) -> str:
    """Anything of a file as words in Markdown: on one line, without HTML, links or marks."""
    line = " ".join(untrusted.printable(str(text)).split())
    return escape(MEANT.sub(lambda found: f"\\{found[0]}", line), quote=False)


def code(text: Any) -> str:
    """Anything of a file as code in Markdown; as an element where backticks wouldn't hold it."""
    line = " ".join(untrusted.printable(str(text)).split())
    return f"<code>{inline(line)}</code>" if set("`<") & set(line) or not line else f"`{line}`"


def card(plan: Plan, verdict: Verdict, run: str) -> str:
    """Markdown. run: how a person starts the engine."""
    name = inline(plan.model["name"])
    lines = [
        f"# {name}, quantized by a plan",
        "",
        f"{verdict.bytes} bytes of weights for {verdict.engine}; "
        f"{plan.effective_bits:.3f} bits per weight over {len(plan.scope)} layers. Made by Mezzotint "
        f"{inline(plan.provenance.get('versions', {}).get('mezzotint', ''))} from plan {plan.id}.",
        "",
        "```",
        run,
        "```",
        "",
        "## How it was made",
        "",
        f"- reference: {name}, {code(plan.model.get('fingerprint', 'unknown'))}",
        f"- quantizer: {inline(plan.quantizer.get('name', 'unknown'))}",
        f"- command: {code(plan.provenance.get('command', 'unknown'))}",
        f"- runtime of the plan: {inline(plan.runtime)}",
        "",
        "| precision | layers | stored as |",
        "| --- | ---: | --- |",
    ]
    for key, count in sorted(Counter(plan.layers.values()).items()):
        stored = "16 bits, untouched" if key == "none" else verdict.stored.get(key, key)
        lines.append(f"| {inline(key)} | {count} | {inline(stored)} |")
    lines += ["", "## What was lost", "", *_loss(plan)]
    if verdict.readers:
        lines += ["", "## Read back", "", *(f"- {inline(reader)}" for reader in verdict.readers)]
    if verdict.notes:
        lines += ["", "## Notes", "", *(f"- {inline(note)}" for note in verdict.notes)]
    lines += [
        "",
        "`plan.json` holds the whole plan with its certificate, `manifest.json` the sha256 of every "
        "file. After writing, every quantized weight was read back and compared with the plan's.",
    ]
    return "\n".join(lines) + "\n"


def _loss(plan: Plan) -> list[str]:
    promise, proof = plan.prediction, plan.proof
    lines = [
        f"Predicted: KL {promise.kl:.4f} +- {promise.stderr:.4f} nats per {promise.unit} from the "
        "reference."
    ]
    if proof is None:
        return [*lines, "", "Not measured on held-out text."]
    lines += [
        "",
        in_unit(
            f"Measured on {proof.documents} held-out documents ({proof.tokens} tokens), "
            f"{inline(proof.interval)}, with the weights of this folder in fp32 arithmetic:",
            proof.unit,
        ),
        "",
        "| measure | value | interval |",
        "| --- | ---: | ---: |",
    ]
    for name in unit_measures(proof.unit):
        own, found = measure(name, proof.unit), proof.own[name]
        value, low, high = map(own.number, (found.value, found.low, found.high))
        lines.append(f"| {own.title} | {value} | {low} to {high} |")
    answer = [] if proof.meaning is None else [inline(proof.meaning.verdict), ""]
    return [*lines, "", *answer, inline(proof.verdict)]
