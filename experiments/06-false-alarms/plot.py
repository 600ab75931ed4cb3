"""results.csv -> results.html: what the power estimate promised against what 200 runs gave."""

from __future__ import annotations

import csv
from pathlib import Path

import plotly.graph_objects as go

HERE = Path(__file__).parent


def main() -> None:
    rows = list(csv.DictReader((HERE / "results.csv").open()))
    shown = [row for row in rows if not row["arm"].startswith("border")]
    figure = go.Figure()
    for key, name in (
        ("promised", "from the whole pool"),
        ("pilot", "from pilots of 24 documents"),
    ):
        figure.add_scatter(
            x=[float(row[key]) for row in shown],
            y=[float(row["kl_decided"]) for row in shown],
            text=[f"{row['arm']}, {row['documents']} documents" for row in shown],
            mode="markers",
            name=name,
        )
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", name="kept exactly", line={"dash": "dash"}
    )
    figure.update_layout(
        title="The certificate's power",
        xaxis_title="promised chance to decide on KL",
        yaxis_title="share of 200 certificates that decided",
    )
    figure.write_html(HERE / "results.html", include_plotlyjs="cdn")


if __name__ == "__main__":
    main()
