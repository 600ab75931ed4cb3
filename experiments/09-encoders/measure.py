"""Plans of an encoder at equal bytes: uniform rounding, the table's optimum, the searched one.

    python measure.py plan NAME TEXT        makes the plan NAME; kept in work/
    python measure.py score NAME TEXT STS   appends its two rows to results.csv

NAME: reference, uniform-BITS, table-BITS, searched-BITS or matched-BITS (the table's optimum,
calibrated on lines of TEXT), BITS of the codes. The bytes are those of uniform rounding, or halfway
between two uniform plans for 2.5 bits. Held-out texts: the project's own sentences, and lines of
TEXT, cut to SHORT tokens. STS is a check: nothing is tuned on it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from experiments.rows import read, stamped, write
from optimizer.certificate.comparison import Candidate, describe, line, ratio
from optimizer.commands.optimize import optimize
from optimizer.config import Optimize, Proof
from optimizer.data.short_texts import PADDING
from optimizer.data.text import Data, Part
from optimizer.metrics.bootstrap import resamples
from optimizer.models.embedding import embed
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import Budget, Plan, Precision
from optimizer.quantization.methods import bind
from optimizer.search import Search
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace, search_space
from optimizer.stages.table import measure_table

HERE = Path(__file__).parent
FILE = HERE / "results.csv"
MEASURES = ("kl", "cosine", "flips", "overlap")
SPACES = {"table": "exact", "searched": "moves", "matched": "exact"}
TOGETHER = 100  # texts in one batch
DRAWS = 1000
SHORT = 64
Choice = Mapping[str, Precision]


def config_of(name: str = "", text: str = "", **more: Any) -> Optimize:
    if name.startswith("matched"):
        more["data"] = lines_of(text)
    return Optimize(model="minilm", budget=Budget(bits=16), proof=Proof(certify=False), **more)


def lines_of(text: str) -> Data:
    part = Part(sequences=24, length=SHORT)
    return Data(source="text", path=text, calibration=part, search=part, heldout=part)


def session_of(config: Optimize, data: Data | None = None) -> Session:
    return Session.open(config.model, data or config.data, config.store)


def uniform(space: SearchSpace, bits: float) -> Choice:
    column = next(
        c for c in space.columns if space.fitted[space.scope[0].name, c].code_bits == bits
    )
    return {layer.name: space.fitted[layer.name, column] for layer in space.scope}


def stored(space: SearchSpace, choice: Choice) -> int:
    return sum(choice[x.name].bytes(x.rows, x.cols) for x in space.scope)


def neighbours(bits: float) -> tuple[int, int]:
    """The uniform plans below and above."""
    return int(bits), int(np.ceil(bits)) if bits % 1 else int(bits)


def make(name: str, text: str) -> None:
    kind, bits = name.split("-")
    config = config_of(name, text, search=Search(space=SPACES[kind]))
    space = search_space(config, session_of(config).inventory)
    low, high = (stored(space, uniform(space, b)) for b in neighbours(float(bits)))
    size = low + (high - low) * (float(bits) % 1)
    config.budget = Budget(bits=8 * size / sum(x.weights for x in space.scope))
    plan = optimize(config, HERE / "work" / name).plan
    assert stored(space, plan.choice) <= size
    print(name, plan.predicted, flush=True)


def choice_of(name: str, space: SearchSpace) -> Choice:
    if name == "reference":
        return {}
    kind, bits = name.split("-")
    if kind == "uniform":
        return uniform(space, float(bits))
    plan = Plan.load(HERE / "work" / name / "plan.json")
    return {x.name: plan.choice[x.name] for x in space.scope}


def promise(
    session: Session, config: Optimize, space: SearchSpace, choice: Choice
) -> tuple[float, float]:
    """The table's prediction and its standard error."""
    table = measure_table(session, config, space)
    columns = [
        next(i for i, c in enumerate(space.columns) if space.fitted[g[0], c] == choice[g[0]])
        for g in space.groups
    ]
    return table.predict(np.array(columns))


def cosines(session: Session, pairs: list[dict[str, object]]) -> np.ndarray:
    """Of the two sentences of each pair; texts of like length are read together."""
    tokenizer = load_tokenizer(session.source.folder)
    texts = [str(p[k]) for p in pairs for k in ("sentence1", "sentence2")]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    z = np.zeros((len(ids), session.model.net.config.hidden_size), dtype=np.float32)
    for first in range(0, len(ids), TOGETHER):
        own = order[first : first + TOGETHER]
        block = np.full((len(own), len(ids[own[-1]])), PADDING)
        for row, i in zip(block, own, strict=True):
            row[: len(ids[i])] = ids[i]
        with torch.inference_mode():
            z[own] = embed(
                session.model.net, torch.from_numpy(block), str(session.model.pooling)
            ).numpy()
    return np.asarray((z[0::2] * z[1::2]).sum(-1))


def sts(session: Session, name: str, choice: Choice, path: str) -> dict[str, float]:
    """Spearman of cosines and people's scores, 100 times; its change from the reference's, with an
    interval over pairs."""
    pairs = [json.loads(text) for text in Path(path).read_text(encoding="utf-8").splitlines()]
    scores = np.array([float(p["score"]) for p in pairs])
    kept = HERE / "work" / f"sts-{name}.npy"
    if not kept.exists():
        with session.model.rounded(bind(config_of().quantizer, session), choice):
            found = cosines(session, pairs)
        kept.parent.mkdir(exist_ok=True)
        np.save(kept, found)
    own, before = np.load(kept), np.load(HERE / "work" / "sts-reference.npy")

    def spearman(values: np.ndarray, rows: np.ndarray) -> float:
        return 100 * float(spearmanr(values[rows], scores[rows]).statistic)

    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(pairs), len(pairs)) for _ in range(DRAWS)]
    change = [spearman(own, rows) - spearman(before, rows) for rows in draws]
    low, high = np.quantile(change, [0.025, 0.975])
    every = np.arange(len(pairs))
    value = spearman(own, every)
    gone = value - spearman(before, every)
    return {"sts": value, "sts_change": gone, "sts_low": float(low), "sts_high": float(high)}


def judged(session: Session, space: SearchSpace, name: str, choice: Choice) -> dict[str, float]:
    """Held-out measures, and the KL over that of the straight line between uniform plans."""
    quantizer = bind(config_of().quantizer, session)

    def candidate(own: Choice) -> Candidate:
        size = stored(space, own) if own else 0
        return Candidate("", size, size, session.score(own, "heldout", quantizer))

    mine = candidate(choice)
    counts = resamples(mine.scores.documents, np.random.default_rng(0))
    measured = describe(mine.scores, counts)
    row: dict[str, float] = {"bytes": mine.bytes}
    for key in MEASURES:
        row |= {key: measured[key].value, f"{key}_low": measured[key].low,
                f"{key}_high": measured[key].high}  # fmt: skip
    if choice:
        low, high = (candidate(uniform(space, b)) for b in neighbours(float(name.split("-")[1])))
        share = ratio(mine.scores, line(low, high, mine.size), counts)
        row |= {"ratio": share.value, "ratio_low": share.low, "ratio_high": share.high}
    return row


def score(name: str, text: str, path: str) -> None:
    rows = read(FILE)
    if any(row["plan"] == name for row in rows):
        return
    config = config_of()
    session = session_of(config)
    space = search_space(config, session.inventory)
    choice = choice_of(name, space)
    shared: dict[str, object] = {"plan": name}
    if choice:
        made = config_of(name, text)
        value, error = promise(session_of(made), made, space, choice)
        shared |= {"predicted": value, "stderr": error}
    shared |= sts(session, name, choice, path)
    given = session_of(config, lines_of(text))
    given.model = session.model
    for label, one in (("own", session), ("given", given)):
        row = shared | {"text": label} | judged(one, space, name, choice)
        rows.append(stamped({k: _spelled(v) for k, v in row.items()}, config, name))
        print(rows[-1], flush=True)
    write(FILE, rows)


def _spelled(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    commands: dict[str, Any] = {"plan": make, "score": score}
    commands[sys.argv[1]](*sys.argv[2:])
