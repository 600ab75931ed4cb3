"""KL against bytes of file, theirs and ours, from matrix.csv and foretold.csv.

Usage: picture.py MODEL OUT.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.rows import read

HERE = Path(__file__).parent
LOOKS = {
    "theirs": ("#8a4b08", "o", "llama.cpp's mixtures, its importance matrix"),
    "rules": ("#777777", "s", "published layer rules, the same matrix"),
    "rules-without-4": ("#bbbbbb", "v", "published layer rules without the model's own grid"),
    "ours": ("#0b6e4f", "D", "our plans"),
    "ours-without-4": ("#4fa3d1", "^", "our plans without the model's own grid"),
}


def main(model: str, out: str) -> None:
    told = sorted((r for r in read(HERE / "foretold.csv") if r["model"] == model), key=_bytes)
    found = [r for r in read(HERE / "matrix.csv") if r["model"] == model]
    figure, axes = plt.subplots(figsize=(7.5, 5), constrained_layout=True)
    for name, (colour, marker, words) in LOOKS.items():
        known = [r for r in told if r.get(name)]
        x = [_bytes(r) for r in known]
        axes.plot(
            x, [float(r[name]) for r in known], colour, ls=":", marker=marker, ms=4, mfc="none"
        )
        own = [r for r in found if r["file"] == {"theirs": "llama.cpp"}.get(name, name)]
        middle = [float(r["kl"]) for r in own]
        low = [m - float(r["low"]) for m, r in zip(middle, own, strict=True)]
        high = [float(r["high"]) - m for m, r in zip(middle, own, strict=True)]
        axes.errorbar([_bytes(r) for r in own], middle, (low, high), color=colour, marker=marker,
                      ms=8, ls="none", capsize=3, label=words)  # fmt: skip
        for r in own if name == "theirs" else ():
            axes.annotate(
                r["at"], (_bytes(r), float(r["kl"])), xytext=(8, 4), textcoords="offset points"
            )
    axes.plot([], [], "k:", label="the same, foretold by the Fisher table")
    axes.set(
        xlabel="MB of file",
        ylabel="KL to the reference, nats per token",
        yscale="log",
        title=model,
    )
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=120)


def _bytes(row: dict[str, str]) -> float:
    return int(row["bytes"]) / 1e6


if __name__ == "__main__":
    main(*sys.argv[1:])
