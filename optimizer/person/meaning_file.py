"""meaning.yaml: a learned objective as a file that `mezzotint optimize ... meaning=FILE` reads, with
what it rests on as comments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import yaml

from optimizer.data.domains import ENTRY
from optimizer.person.learning import ENOUGH, FREE, Learned, Weight


def text(found: Learned, sources: str, folder: Path) -> str:
    """The whole file. folder: where it will lie, which its own paths are relative to."""
    values = asdict(found.meaning)
    if values["choices"] is not None:
        values["choices"] = os.path.relpath(values["choices"], folder)
    values["domains"] = [_relative(entry, folder) for entry in values["domains"]]
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    head = "".join(f"# {line}\n" for line in _lines(found, sources))
    return head + body


def _relative(entry: str, folder: Path) -> str:
    """A domain's entry, with its file as seen from the folder."""
    match = ENTRY.fullmatch(entry)
    if match is None or match[2] is None:
        return entry
    return f"{match[1]} = {os.path.relpath(match[2], folder)} * {match[3] or 1}"


def _lines(found: Learned, sources: str) -> Iterator[str]:
    """No line may end a comment: names come from files of others."""
    for line in [
        f"An objective for mezzotint optimize ... meaning=FILE, learned from {sources}.",
        *summary(found),
        *(weight_line(one) for one in found.weights),
    ]:
        yield " ".join(line.split())


def summary(found: Learned) -> list[str]:
    """What there is to say about all weights together."""
    people = ", ".join(f"{name} {count}" for name, count in found.judges.items())
    lines = [f"{found.votes} votes ({people})." if found.votes else "No votes, only choices."]
    if found.votes and found.noise:
        lines.append(
            f"These votes can't be told from noise (p = {found.noise_p:.2f}): the weights stay the "
            "default ones, the mean KL alone."
        )
    elif found.votes:
        lines.append(
            f"The votes follow the features (p = {found.noise_p:.2f} of noise); what few votes speak "
            "about stays near the default."
        )
    if len(found.judges) > 1:
        alpha = found.agreement
        lines.append(
            "Nobody answered the same questions, so agreement isn't known."
            if alpha is None
            else f"Agreement between people on the same questions: Krippendorff's alpha {alpha:.2f} "
            "(1: all agree, 0: as by chance)."
        )
    if found.left_out:
        lines.append(
            f"Minded, but without a text to measure it on: {', '.join(found.left_out)}. Give one with "
            f"texts=['{found.left_out[0]} = FILE']."
        )
    return lines


def weight_line(one: Weight) -> str:
    return (
        f"{one.column.title}: {one.value:.2f} [{one.low:.2f}, {one.high:.2f}], default "
        f"{one.default:.2f}, {one.votes} votes; {settled(one)}."
    )


def settled(one: Weight) -> str:
    """How many more votes would settle a weight."""
    if one.more is None:
        return f"more than {ENOUGH} more votes would be needed to settle it"
    if one.more:
        return f"about {one.more} more votes like these would settle it"
    same = one.low <= one.default <= one.high
    if one.column.family in FREE:
        return "settled"
    return "settled: about the default" if same else "settled: not the default"
