"""What a certificate's numbers mean, in plain words; never more than its bounds allow. Works on the
types of plan.json, so that an old plan reads the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from optimizer.plan.certificate import Certificate, Evaluation, Finding, Greedy, Moved
from optimizer.plan.measures import MEASURES, Unit

MAIN = "held-out"  # the text that every certificate has
FEW = 8  # documents; below this a bootstrap's interval is too narrow to be believed

Findings = Sequence[Finding]
Documents = Mapping[str, int]
MARKS = {"within": "\u2713", "over": "\u2717", "open": "?"}


def brief(proof: Certificate) -> str:
    """A certificate in one sentence: the same model or not, and beside which other plan."""
    same, beside = _same(proof.meaning), proof.verdict
    return f"{same}; {beside[0].lower()}{beside[1:]}" if same else beside


def _same(found: Evaluation | None) -> str:
    if found is None:
        return ""
    if found.state == "lossless":
        return f"Lossless within the tolerance (KL {found.tolerance.kl:g})"
    if found.state == "open":
        return "Not enough text to say whether it is lossless"
    over = [finding for finding in found.findings if finding.state == "over"]
    most = max(over, key=lambda f: f.value / f.tolerated)
    elsewhere = len({finding.text for finding in over}) - 1
    more = f", and on {elsewhere} more kinds of text" if elsewhere > 1 else ""
    return (
        f"Lossy: on {_text(most.text)} {_word(most)} {_number(most, most.value)}, "
        f"tolerated {_number(most, most.tolerated)}{more}"
    )


def marks(findings: Findings, text: str) -> str:
    """One text's findings with a mark each: within its tolerance, over it, or not enough text."""
    mine = [finding for finding in findings if finding.text == text]
    return " ".join(f"{MARKS[f.state]} {_word(f)}" for f in mine)


def in_unit(said: str, unit: Unit) -> str:
    """A sentence about documents and tokens, as it reads for an encoder's batches and texts."""
    if unit == "token":
        return said
    for word, own in (("documents", "batches"), ("document", "batch"), ("token", "text")):
        said = said.replace(word, own)
    return said


def sentence(found: Evaluation) -> str:
    """The answer: lossless within the tolerance, lossy and where, or not enough text to say."""
    documents = {row.name: row.documents for row in found.texts}
    say = {"lossy": _lossy, "lossless": _lossless, "open": _open}[found.state]
    said = in_unit(say(found.findings, documents), found.unit)
    loudest = max((row["kl"].value for row in found.noise), default=0.0)
    tolerated = found.tolerance.kl
    if loudest >= tolerated:
        said += (
            f" The tolerated KL of {tolerated:.4f} is no more than what the arithmetic alone "
            f"changes: the reference differs from itself by {loudest:.4f}."
        )
    return said


def _lossy(findings: Findings, documents: Documents) -> str:
    over = [finding for finding in findings if finding.state == "over"]
    where = []
    for text in dict.fromkeys(finding.text for finding in over):
        mine = [_measured(finding) for finding in over if finding.text == text]
        where.append(f"on {_text(text)} {', '.join(mine)}")
    return f"Lossy: {'; '.join(where)}.{_elsewhere(findings, documents)}"


def _measured(finding: Finding) -> str:
    gain = finding.measure == "accuracy" and finding.value < 0
    bound = f"at most {_number(finding, finding.high)}"
    bound = bound if gain else f"at least {_number(finding, finding.least)}"
    return (
        f"{_word(finding)} {_number(finding, finding.value)} ({bound}; tolerated "
        f"{_number(finding, finding.tolerated)})"
    )


def _lossless(findings: Findings, documents: Documents) -> str:
    main = [finding for finding in findings if finding.text == MAIN]
    words = [
        f"{_word(f)} at most {_number(f, max(f.high, -f.low))} (tolerated "
        f"{_number(f, f.tolerated)})"
        for f in main
    ]
    return (
        f"Lossless within the tolerance on {documents[MAIN]} held-out documents: "
        f"{', '.join(words)}, each with 95 % confidence.{_elsewhere(findings, documents)}"
    )


def _open(findings: Findings, documents: Documents) -> str:
    main = [f for f in findings if f.text == MAIN and f.state == "open"]
    words = [
        f"{_word(f)} {_number(f, f.value)}, between {_number(f, f.low)} and "
        f"{_number(f, f.high)}, tolerated {_number(f, f.tolerated)}"
        for f in main
    ]
    said = (
        f"Not enough text to say whether it is lossless, on {documents[MAIN]} documents: "
        f"{'; '.join(words)}. "
    )
    if documents[MAIN] < FEW:
        said = f"Not enough text to say: {documents[MAIN]} documents; {FEW} are the least. "
    if any(f.needed is None for f in main):
        said += "The loss is so near its tolerance that no amount of text is likely to decide."
    else:
        said += f"About {max(f.needed or 0 for f in main)} documents like these would be enough."
    return said + _elsewhere(findings, documents)


def _elsewhere(findings: Findings, documents: Documents) -> str:
    """What isn't said of the domains above."""
    states: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.text != MAIN:
            states.setdefault(finding.text, []).append(finding)
    good = [text for text, mine in states.items() if all(f.state == "within" for f in mine)]
    bad = [text for text, mine in states.items() if any(f.state == "over" for f in mine)]
    unsure = [text for text in states if text not in good and text not in bad]
    said = f" Lossless in {', '.join(good)}." if good else ""
    if unsure:
        each = [f"{t} ({documents[t]} documents; {_enough(states[t])})" for t in unsure]
        said += f" Not enough text to say in {', '.join(each)}."
    return said


def _enough(findings: Findings) -> str:
    wanting = [finding.needed for finding in findings if finding.state == "open"]
    needed = [count for count in wanting if count is not None]
    if len(needed) < len(wanting):
        return "too near the tolerance for any amount of text"
    return f"about {max(needed)} would do"


def _text(name: str) -> str:
    return "the held-out text" if name == MAIN else name


def _word(finding: Finding) -> str:
    return MEASURES[finding.measure].word


def _number(finding: Finding, value: float) -> str:
    return MEASURES[finding.measure].amount(value)


def in_short(states: Collection[str]) -> str:
    """One text's findings in a word."""
    if not states:
        return ""
    return "no" if "over" in states else "yes" if set(states) == {"within"} else "can't say"


def in_words(found: Evaluation) -> list[str]:
    """What supports the verdict, a sentence each; for the terminal and the page."""
    lines = []
    if found.worst is not None:
        lines.append(
            f"Worst domain: {found.worst.name}, KL {found.worst['kl'].value:.4f}; the weighted mean "
            f"of the domains is {found.weighted_kl:.4f}."
        )
    if found.mcnemar is not None:
        test = found.mcnemar
        lines.append(
            "Of the tokens that only one of the two ranks first, the reference is right at "
            f"{test.lost} and the plan at {test.won} (McNemar over documents: p = {test.p:.2g})."
        )
    if found.half_of_loss:
        named = in_unit("documents", found.unit)
        lines.append(
            f"Half of the held-out loss is in {found.half_of_loss} of {found.texts[0].documents} "
            f"{named}. {_worst(found.documents, named)}"
        )
    if found.greedy is not None:
        lines.append(greedy_words(found.greedy))
    return lines


def _worst(documents: Sequence[Moved], named: str) -> str:
    each = [
        f"{one.text} {one.document} ({one.kl:.3f}" + (f', "{one.begins}")' if one.begins else ")")
        for one in documents[:3]
    ]
    return f"The most moved {named}: {', '.join(each)}."


def greedy_words(found: Greedy) -> str:
    """The comparison of greedy texts in a sentence."""
    mean, median = found.mean, found.median.value
    middle = f"half of them for {median:.0f} or fewer" if median is not None else "most to the end"
    shares = {name: 100 * share.value for name, share in found.repeated.items()}
    return (
        f"Greedy texts of {found.limit} tokens stay the same for {mean.value:.1f} tokens on average "
        f"(95 %: {mean.low:.1f} to {mean.high:.1f}), {middle}; {found.never} of "
        f"{found.prompts} never part. Repeated 4-grams: {shares['plan']:.1f} %, the reference "
        f"{shares['reference']:.1f} %."
    )
