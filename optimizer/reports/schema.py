"""What run.json may hold, as types: read by `Run.load` before anything is drawn."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from optimizer.plan.measures import Unit
from optimizer.plan.schema import Precision
from optimizer.untrusted import Count, Fields, LineOfText, Name, Number, Share, Words


class Point(Fields):
    """`optimizer.reports.run.Point`."""

    name: LineOfText
    id: LineOfText
    bytes: Count
    bits: Share
    predicted: Number
    measured: Number | None = None
    measures: dict[Name, dict[Name, Number]] = Field(default_factory=dict)
    layers: str = ""
    moved: Count = 0
    seconds: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _whole(self) -> Point:
        kl = self.measures.get("kl")
        if kl is not None and not {"low", "high"} <= kl.keys():
            raise ValueError("measures.kl needs low and high")
        if 0 < self.seconds < 1e-12:
            raise ValueError("no token takes so few seconds")
        return self


class AskedSearch(Fields):
    """Of a run's settings, what its page reads."""

    third: Literal["read", "time", "price"] | None = None
    hourly_rate: Share | None = None


class AskedData(Fields):
    source: LineOfText | None = None
    path: LineOfText | None = None


class Asked(Fields):
    search: AskedSearch = AskedSearch()
    data: AskedData = AskedData()


class RunFile(Fields):
    """All of run.json."""

    model: LineOfText
    key: LineOfText
    columns: dict[Name, Precision]
    groups: list[list[Name]]
    chosen: Point
    front: list[Point]
    measured: list[Point]
    prediction: dict[Name, Number | None]
    notes: list[Words]
    config: Asked
    seconds: Share
    unit: Unit = "token"

    @model_validator(mode="after")
    def _fitting(self) -> RunFile:
        letters = {chr(48 + i) for i in range(len(self.columns))}
        for point in (self.chosen, *self.front, *self.measured):
            if point.layers and len(point.layers) != len(self.groups):
                raise ValueError(f"the plan {point.name[:40]} has not one letter a group")
            if not set(point.layers) <= letters:
                raise ValueError(f"the plan {point.name[:40]} has a letter of no column")
        known = {key for key, value in self.prediction.items() if value is not None}
        if "spearman" in known and not {"plans", "calibration"} <= known:
            raise ValueError("prediction.spearman needs plans and calibration")
        return self


def numbers(values: Any) -> dict[str, float]:
    """The numbers that a run's prediction has; those that could not be told are left out."""
    return {str(key): float(value) for key, value in values.items() if value is not None}
