"""results.csv -> results-MODEL.html: held-out KL over code bits, one line per rounding and table."""

from __future__ import annotations

import csv
from pathlib import Path

import plotly.graph_objects as go

HERE = Path(__file__).parent


def main() -> None:
    rows = [row for row in csv.DictReader((HERE / "results.csv").open()) if row["kl"]]
    for model in sorted({row["model"] for row in rows}):
        figure = go.Figure()
        mine = [row for row in rows if row["model"] == model]
        for method, plan in sorted({(row["method"], row["plan"]) for row in mine}):
            points = [row for row in mine if (row["method"], row["plan"]) == (method, plan)]
            points.sort(key=lambda row: float(row["code_bits"]))
            figure.add_scatter(
                x=[float(row["code_bits"]) for row in points],
                y=[float(row["kl"]) for row in points],
                name=f"{method}, {plan}",
                mode="lines+markers" if plan == "uniform" else "markers",
                marker={"symbol": "circle" if plan == "uniform" else "star", "size": 9},
            )
        figure.update_layout(
            title=f"Rounding {model}: held-out KL against the reference",
            xaxis_title="code bits per weight",
            yaxis_title="KL, nats per token (lower is better)",
            yaxis_type="log",
        )
        figure.write_html(HERE / f"results-{model}.html", include_plotlyjs="cdn")


if __name__ == "__main__":
    main()
