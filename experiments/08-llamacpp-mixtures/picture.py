"""KL against bytes of file, theirs and ours, from matrix.csv and foretold.csv, by two counts.
Files of one line have about the same bytes and are drawn a little beside each other.

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
    "ours-gptq-gradient": ("#c2185b", "*", "our plans, codes by gptq"),
}


COUNTS = {"": "every position", "half_": "second half of each window, as llama.cpp counts"}
BESIDE = 1.2e-2  # of the sizes' range, between files of about the same bytes


def main(model: str, out: str) -> None:
    told = sorted((r for r in read(HERE / "foretold.csv") if r["model"] == model), key=_bytes)
    found = [r for r in read(HERE / "matrix.csv") if r["model"] == model]
    each = {n: [r for r in found if r["file"] == {"theirs": "llama.cpp"}.get(n, n)] for n in LOOKS}
    shown = [n for n in LOOKS if each[n] or any(r.get(n) for r in told)]
    beside = BESIDE * (_bytes(told[-1]) - _bytes(told[0]))
    figure, panels = plt.subplots(1, 2, figsize=(12, 6), sharey=True, constrained_layout=True)
    for axes, (count, words) in zip(panels, COUNTS.items(), strict=True):
        for place, name in enumerate(shown):
            colour, marker, label = LOOKS[name]
            known = [r for r in told if r.get(name)]
            x, y = [_bytes(r) for r in known], [float(r[name]) for r in known]
            axes.plot(x, y, colour, ls=":", marker=marker, ms=4, mfc="none")
            x = [_bytes(r) + beside * (place - (len(shown) - 1) / 2) for r in each[name]]
            middle = [float(r[f"{count}kl"]) for r in each[name]]
            low = [m - float(r[f"{count}low"]) for m, r in zip(middle, each[name], strict=True)]
            high = [float(r[f"{count}high"]) - m for m, r in zip(middle, each[name], strict=True)]
            axes.errorbar(x, middle, (low, high), color=colour, marker=marker, ms=7, ls="none",
                          capsize=2, label=label)  # fmt: skip
        axes.plot([], [], "k:", label="the same, foretold by the Fisher table")
        axes.set(xlabel="MB of file", yscale="log")
        axes.set_title(f"{model}, {words}", fontsize=10, pad=42)
        for r in each["theirs"]:
            axes.axvline(_bytes(r), color="#eeeeee", zorder=0)
            axes.annotate(
                r["at"], (_bytes(r), 1.01), xycoords=("data", "axes fraction"), fontsize=8,
                rotation=45, ha="left", annotation_clip=False,
            )  # fmt: skip
    panels[0].set(ylabel="KL to the reference, nats per token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=3, loc="outside lower center")
    figure.savefig(out, dpi=110)


def _bytes(row: dict[str, str]) -> float:
    return int(row["bytes"]) / 1e6


if __name__ == "__main__":
    main(*sys.argv[1:])
