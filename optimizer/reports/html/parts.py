"""The sections of the page: facts of a plan and a run -> HTML. Everything that isn't a literal
goes through `escape`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from optimizer.certificate.wording import brief, in_unit, in_words, marks
from optimizer.plan import Plan, Precision
from optimizer.plan.certificate import Certificate, Evaluation, PlanRow, Row, TextRow
from optimizer.plan.measures import Measure, shown
from optimizer.reports import heat_map
from optimizer.reports.html import chart
from optimizer.reports.run import Point, Run, overrides

EXPERTS = 6  # experts of a cell that are named; the rest is counted


def head(plan: Plan, run: Run) -> str:
    """Title, verdict and the few numbers that matter."""
    proof = plan.proof
    if proof is not None:
        kl = proof.own["kl"]
        loss = (
            f"{kl.value:.4f}",
            f"KL on held-out text, 95 %: {kl.low:.4f} to {kl.high:.4f}",
        )
    else:
        loss = (f"{plan.prediction.kl:.4f}", "KL, predicted only; not measured on held-out text")
    facts = [
        (chart.size(plan.bytes["total"]), "whole weight file"),
        (f"{plan.effective_bits:.3f}", "bits per weight in scope, scales counted"),
        loss,
    ]
    if "spearman" in run.prediction:
        count = int(run.prediction["plans"])
        facts.append(
            (f"{run.prediction['spearman']:.3f}", f"rank correlation of prediction, {count} plans")
        )
    cells = "".join(f"<div><dt>{escape(b)}</dt><dd>{escape(a)}</dd></div>" for a, b in facts)
    verdict = "No certificate: nothing was measured on held-out text."
    verdict = verdict if proof is None else proof.verdict
    notes = "".join(f'<p class="note"><b>Note:</b> {escape(note)}</p>' for note in run.notes)
    return (
        f"<header><p class=over>Mezzotint report</p><h1>{escape(run.model)}</h1>"
        f"<p class=verdict>{escape(verdict)}</p><dl class=facts>{cells}</dl>{notes}</header>"
    )


LEGEND = {
    "chosen": "the chosen plan",
    "front": "predicted front",
    "uniform": "uniform plans",
    "random": "random plans",
    "searched": "searched front",
    "baseline": "other baselines",
}


MOVED = {"token": "next-token distribution", "text": "distribution of a text's similarities"}
READ = {"token": "read per token", "text": "read per pass"}


def front(plan: Plan, run: Run) -> str:  # noqa: ARG001
    roles = {role for _, role in chart.shown(run)}
    keys = "".join(
        f'<li><svg viewBox="-12 -12 24 24" aria-hidden="true">{chart.mark(role)}</svg>{text}</li>'
        for role, text in LEGEND.items()
        if role in roles
    )
    return (
        f"<ul class=legend>{keys}</ul>{chart.front(run)}"
        "<p class=hint>The front is the table's prediction; marks are measured on search documents "
        f"where a plan was measured. KL says how far the quantized model's {MOVED[run.unit]} "
        "moved from the reference's: 0 is no change. <span class=script>Point at a plan to read it; "
        "click it to see its heat map.</span></p>"
        f"{_measured_table(run)}"
    )


def _measured_table(run: Run) -> str:
    shown = chart.shown(run)
    rows = [(i, p, role) for i, (p, role) in enumerate(shown) if role not in ("front", "random")]
    speeds = speed_columns(run, [point for _, point, _ in rows])
    names = ("plan", "size", "bits", *speeds, "predicted KL", "measured KL")
    head = "".join(f"<th scope=col>{name}</th>" for name in names)
    body = "".join(
        _measured_row(i, point, role, [column[row] for column in speeds.values()])
        for row, (i, point, role) in enumerate(rows)
    )
    hidden = sum(role == "random" for _, role in shown)
    note = f"<p class=hint>{hidden} random plans are in the chart and in measured.csv.</p>"
    return (
        f"<details><summary>The measured plans as a table</summary><div class=wide><table><thead>"
        f"<tr>{head}<th scope=col class=script>heat map</th></tr></thead><tbody>{body}</tbody>"
        f"</table></div>{note if hidden else ''}</details>"
    )


def speed_columns(run: Run, points: Sequence[Point]) -> dict[str, list[str]]:
    """What is known of the plans' speed, by the column's title; a cell per plan."""
    found = {READ[run.unit]: [chart.size(p.moved) if p.moved else "" for p in points]}
    if any(p.seconds for p in points):
        found["ms per token"] = [f"{1000 * p.seconds:.3g}" if p.seconds else "" for p in points]
        found["tokens/s"] = [f"{1 / p.seconds:.3g}" if p.seconds else "" for p in points]
    prices = [run.price(p) for p in points]
    if any(prices):
        found["a million cost"] = ["" if cost is None else f"{cost:.3g}" for cost in prices]
    return found


def third(run: Run) -> str:
    """Speed, where it was an objective."""
    words = {
        "read": "Bytes are counted: every weight once, of an embedding a row, of experts those that "
        "are chosen, and the cache.",
        "time": "Times are sums over the layers, each measured alone and packed on this machine, and "
        "the rest of the model. <code>mezzotint evaluate speed=64</code> measures a whole model.",
    }
    words["price"] = words["time"]
    return f"{chart.third(run)}<p class=hint>{words[str(run.third)]}</p>"


def _measured_row(index: int, point: Point, role: str, speeds: Sequence[str]) -> str:
    measured = "" if point.measured is None else chart.loss(point.measured)
    kl = point.measures.get("kl")
    if kl:
        measured += f" <small>[{chart.loss(kl['low'])}, {chart.loss(kl['high'])}]</small>"
    name = "chosen plan" if role == "chosen" else point.name
    cells = (chart.size(point.bytes), f"{point.bits:.3f}", *speeds, chart.loss(point.predicted))
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    button = (
        f'<button type=button data-show="{index}" aria-label="Show {escape(name)}">show</button>'
    )
    return (
        f"<tr><th scope=row>{escape(name)}</th>{numbers}<td>{measured}</td>"
        f"<td class=script>{button}</td></tr>"
    )


# ---------------------------------------------------------------- heat map


def heat(plan: Plan, run: Run) -> str:
    group = {name: i for i, names in enumerate(run.groups) for name in names}
    keys = "".join(
        f'<span class="cell h{heat_map.shade(bits)}">{bits}</span>' for bits in heat_map.STEPS
    )
    return (
        f"<p id=shown aria-live=polite>Shown: the chosen plan.</p>{heat_table(plan, group)}"
        f"<p class=hint>Bits per weight: {keys} (t: ternary, 16: untouched). Rows are kinds of "
        "layers, columns are blocks from the input on the left to the output on the right.</p>"
    )


def heat_table(plan: Plan, group: Mapping[str, int]) -> str:
    """Kinds of layers x blocks. group: layer name -> index in `layers`, for the script."""
    choice = plan.choice
    cells, rest = heat_map.arrange(choice)
    blocks = sorted({block for row in cells.values() for block in row})
    if len(blocks) * len(cells) > heat_map.MOST_CELLS:
        return f"<p>{len(cells)} kinds of layers in {len(blocks)} blocks are too many to draw.</p>"
    head = "".join(f"<th scope=col>{block}</th>" for block in blocks)
    rows = []
    for kind, row in cells.items():
        found = "".join(_heat_cell(row.get(block, []), choice, group) for block in blocks)
        rows.append(f"<tr><th scope=row>{escape(kind)}</th>{found}</tr>")
    for name in rest:
        cell = _heat_cell([name], choice, group)
        rows.append(f"<tr><th scope=row>{escape(name.removesuffix('.weight'))}</th>{cell}</tr>")
    return (
        "<div class=wide><table class=heat><caption>Bits of each layer</caption><thead><tr>"
        f"<th scope=col>block</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _heat_cell(names: list[str], choice: Mapping[str, Precision], group: Mapping[str, int]) -> str:
    if not names:
        return "<td></td>"
    text, shade = heat_map.label([choice[name] for name in names])
    kinds = list(dict.fromkeys(choice[name].name for name in names))
    title = names[0] if len(names) == 1 else f"{len(names)} layers like {names[0]}"
    title += ": " + ", ".join(kinds[:EXPERTS])
    known = [str(group[name]) for name in names if name in group]
    own = f' data-g="{",".join(dict.fromkeys(known))}"' if len(known) == len(names) else ""
    return f'<td class="h{shade}" title="{escape(title)}"{own}>{text}</td>'


# ---------------------------------------------------------------- numbers


def prediction(run: Run) -> str:
    found = run.prediction
    if not any(point.measured is not None for point in run.measured):
        return "<p>No plan was measured in this run (proof.certify=false).</p>"
    words = "Each mark is a plan; on the dashed line the table foretold its loss exactly."
    if "spearman" in found:
        words += (
            f" Over {found['plans']:.0f} plans the rank correlation is {found['spearman']:.3f}: 1 "
            f"would mean that the table orders all plans rightly. Measured over predicted is "
            f"{found['calibration']:.2f} in the median"
        )
        own = found.get("calibration_plan")
        words += "." if own is None else f" and {own:.2f} for the chosen plan."
    return f"{chart.prediction(run)}<p class=hint>{words}</p>"


def bytes_table(plan: Plan) -> str:
    """Kinds of layers by their bytes in the packed file, largest first."""
    sizes: dict[str, list[float]] = {}
    cells, rest = heat_map.arrange(plan.layers)
    choice = plan.choice
    kinds = {kind: [n for names in row.values() for n in names] for kind, row in cells.items()}
    kinds |= {name.removesuffix(".weight"): [name] for name in rest}
    for kind, names in kinds.items():
        shapes = {name: plan.shapes[name] for name in names if name in plan.shapes}
        stored = sum(choice[name].bytes(*shape) for name, shape in shapes.items())
        weights = sum(rows * cols for rows, cols in shapes.values())
        sizes[kind] = [stored, 8 * stored / max(weights, 1)]
    known = sum(stored for stored, _ in sizes.values())
    tensors = plan.bytes["quantized"] + plan.bytes.get("untouched", 0)
    order = sorted(sizes.items(), key=lambda item: -item[1][0])
    rows = [(kind, stored, f"{bits:.2f}") for kind, (stored, bits) in order]
    rows += [("norms, biases and other tensors", tensors - known, "")]
    rows += [("the file's header", plan.bytes.get("container", 0), "")]
    total = plan.bytes["total"]
    body = "".join(_bytes_row(name, stored, bits, total) for name, stored, bits in rows)
    return (
        "<div class=wide><table class=bytes><thead><tr><th scope=col>layers</th><th scope=col>bytes"
        "</th><th scope=col>share</th><th scope=col>bits per weight</th></tr></thead>"
        f"<tbody>{body}</tbody><tfoot><tr><th scope=row>total</th><td>{total}</td><td>100 %</td>"
        "<td></td></tr></tfoot></table></div>"
    )


def _bytes_row(name: str, stored: float, bits: str, total: int) -> str:
    share = min(100.0, 100 * stored / max(total, 1))
    bar = f'<span class=bar style="width:{share:.1f}%"></span>'
    return (
        f"<tr><th scope=row>{escape(name)}</th><td>{stored:.0f}</td>"
        f"<td class=share>{bar}<span>{share:.1f} %</span></td><td>{bits}</td></tr>"
    )


# ---------------------------------------------------------------- certificate


def certificate(plan: Plan) -> str:
    proof = plan.proof
    if proof is None:
        return (
            "<p>Nothing was measured on held-out text, so nothing is claimed. Run without "
            "proof.certify=false to get a certificate.</p>"
        )
    words = _of_texts(proof) if proof.unit == "text" else _of_tokens(proof)
    columns = shown(proof.unit)
    head = "".join(f"<th scope=col>{column.title}</th>" for column in columns)
    body = "".join(_proof_row(row, columns) for row in proof.rows)
    between, line = proof.versus.line, ""
    if between is not None:
        line = (
            f"<p>At exactly the plan's bytes, a straight {escape(between.name)} would give a KL "
            f"of {between.kl:.4f}; the plan has {between.ratio.value:.2f} times that.</p>"
        )
    return (
        f"<p><b>{escape(brief(proof))}</b></p>"
        "<div class=wide><table class=cards>"
        f"<caption>{escape(proof.interval)} in brackets</caption><thead><tr><th scope=col>plan"
        f"</th><th scope=col>size</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<p class=hint>Lower is better, except {BETTER[proof.unit]}. &ldquo;plan&rdquo; is the "
        f"chosen one.</p><details><summary>In words</summary><p>{words}</p>{line}</details>"
        f"{'' if proof.meaning is None else _meaning(proof.meaning)}"
    )


BETTER = {
    "token": "EAR: the share of probability that both models agree on",
    "text": "the nearest texts that stay",
}


def _of_tokens(proof: Certificate) -> str:
    own = proof.own
    return (
        f"The plan was compared with the reference on {proof.documents} documents ({proof.tokens} "
        "tokens) that were not used to make it. Per token, its predictions move by "
        f"{own['kl'].value:.4f} nats on average and by {own['kl_p99'].value:.3f} or more at "
        f"the worst 1 % of tokens. At {100 * own['flips'].value:.1f} % of tokens it finds "
        f"another token most likely. Its perplexity is {own['perplexity'].value:.3f}, the "
        f"reference's {own['perplexity_reference'].value:.3f}."
    )


def _of_texts(proof: Certificate) -> str:
    own = proof.own
    return (
        f"The plan was compared with the reference on {proof.tokens} texts in {proof.documents} "
        f"batches that were not used to make it. The cosine of two texts changes by "
        f"{own['cosine'].value:.4f} on average, and by {own['cosine_p99'].value:.4f} or more "
        f"for 1 % of the pairs. {100 * own['flips'].value:.1f} % of the texts have another nearest "
        f"text, and {100 * own['overlap'].value:.1f} % of the 10 nearest stay among them. KL is "
        "that of a text's similarities to the others of its batch, in nats per text."
    )


def _meaning(found: Evaluation) -> str:
    """Whether it is the reference within the tolerance."""
    columns = [column for column in shown(found.unit) if column.name != "perplexity"]
    head = "".join(f"<th scope=col>{column.title}</th>" for column in columns)
    rows = [*found.texts, *found.noise]
    body = "".join(_text_row(row, columns, marks(found.findings, row.name)) for row in rows)
    words = "".join(f"<p>{escape(line)}</p>" for line in (found.verdict, *in_words(found)))
    return (
        f"<div class=wide>"
        "<table class=cards>"
        "<caption>By text; below, the reference against itself, which is the noise that no plan can "
        "beat</caption><thead><tr><th scope=col>text</th>"
        f"<th scope=col>{in_unit('documents', found.unit)}</th><th scope=col>within tolerance</th>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></div><p class=hint>\u2713 within its "
        "tolerance, \u2717 over it, ? not enough text to say.</p><details><summary>In words"
        f"</summary>{words}</details>"
    )


def _text_row(row: TextRow, columns: Sequence[Measure], short: str) -> str:
    cells = [_named("documents", str(row.documents))]
    cells += [_named("within tolerance", short) if short else "<td></td>", *_values(row, columns)]
    return f"<tr><th scope=row>{escape(row.name)}</th>{''.join(cells)}</tr>"


def _values(row: Row, columns: Sequence[Measure]) -> list[str]:
    cells = []
    for column in columns:
        found = row[column.name]
        value, low, high = map(column.number, (found.value, found.low, found.high))
        cells.append(_named(column.title, f"{value} <small>[{low}, {high}]</small>"))
    return cells


def _named(title: str, html: str) -> str:
    """A cell that a phone shows with its column's title."""
    return f'<td data-name="{escape(title)}"><span>{html}</span></td>'


def _proof_row(row: PlanRow, columns: Sequence[Measure]) -> str:
    cells = [_named("size", chart.size(row.bytes)), *_values(row, columns)]
    own = ' class="own"' if row.name == "plan" else ""
    return f"<tr{own}><th scope=row>{escape(row.name)}</th>{''.join(cells)}</tr>"


# ---------------------------------------------------------------- reproduce


def reproduce(plan: Plan, run: Run) -> str:
    command = shlex.join(["mezzotint", "optimize", *overrides(run.config)])
    origin = plan.provenance
    rows = [
        ("model", f"{run.model}, {plan.model.get('fingerprint', '')}"),
        ("plan", plan.id),
        ("run", run.key),
        ("seeds", f"search {run.config.get('seed')}, data {_data_seed(run)}"),
        ("text", _text(run)),
        ("quantizer", str(plan.quantizer.get("name"))),
        ("table", str(plan.predicted.get("estimator", ""))),
        ("versions", ", ".join(f"{k} {v}" for k, v in origin.get("versions", {}).items())),
        ("time", f"{run.seconds:.0f} s, with what the store already held"),
    ]
    return (
        f"<pre tabindex=0><code>{escape(command)}</code></pre>"
        "<p>Then pack and measure it:</p><pre tabindex=0><code>mezzotint apply plan.json out=packed"
        "\nmezzotint evaluate model=packed</code></pre>" + _facts(rows)
    )


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f"<tr><th scope=row>{name}</th><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return f"<div class=wide><table class=plain><tbody>{body}</tbody></table></div>"


def _data_seed(run: Run) -> Any:
    return run.config.get("data", {}).get("seed")


def _text(run: Run) -> str:
    data = run.config.get("data", {})
    if data.get("source") == "bundled" and run.unit != "text":
        return "the bundled texts"
    if data.get("source") in ("self", "bundled"):
        own = "the project's own sentences"
        return own if run.unit == "text" else "sampled from the reference itself"
    return f"{data.get('source')}: {data.get('path')}"
