"""What `effort` means: how a run rounds, measures and searches where nobody said so.

Three points on the curve of held-out KL against processor time, measured in experiments/15-defaults:

    quick       rounding to nearest, the table's optimum, fewer windows
    standard    gptq, its table foretold by `sensitivity=gain`, the table's optimum
    thorough    standard's plan, then a search on the measured loss around it, which keeps the start
                unless text that it hadn't used says otherwise

Whatever is named (quantizer=rtn, search=moves, ...) stays as it was named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from optimizer.config import AUTO, Optimize
from optimizer.data.text import Part
from optimizer.errors import ConfigError
from optimizer.quantization.methods import Gptq, Rtn
from optimizer.sensitivity import Estimator, Fisher, estimator

EFFORTS = ("quick", "standard", "thorough")
QUICK_WINDOWS = 8  # of calibration, in place of the default number
ENOUGH = 16  # windows that a diagonal's table reads; gptq's Hessians read all


def check(config: Optimize) -> None:
    if config.effort not in EFFORTS:
        raise ConfigError(f"effort is one of {', '.join(EFFORTS)}, not {config.effort!r}.")


def reading(config: Optimize) -> Optimize:
    """With the text that this effort reads; a number of windows that somebody chose stays."""
    usual, own = Part(sequences=64, length=128), config.data.calibration
    if config.effort != "quick" or own != usual:
        return config
    few = max(QUICK_WINDOWS, config.sensitivity.chunks)
    fewer = replace(config.data, calibration=replace(own, sequences=few))
    return replace(config, data=fewer)


def settle(
    config: Optimize, encoder: bool, refusal: Callable[[], str | None]
) -> tuple[Optimize, list[str]]:
    """Every `auto` replaced by what it means for this kind of model, and what there is to say.
    refusal: why gptq can't round this model, or None; asked only if gptq would be chosen."""
    quantizer, notes = config.quantizer, []
    if quantizer.name == AUTO:
        quantizer = Rtn(clip=quantizer.clip)
        why = None if encoder or config.effort == "quick" else refusal()
        if why is not None:
            notes.append(f"Rounded to nearest, because gptq can't be used here: {why}")
        elif not encoder and config.effort != "quick":
            quantizer = Gptq(clip=quantizer.clip)
    sensitivity, search = config.sensitivity, config.search
    if sensitivity.estimator == AUTO:
        suiting = estimator(quantizer.estimator)
        sensitivity = replace(
            suiting(chunks=sensitivity.chunks, measured=sensitivity.measured),
            windows=_windows(sensitivity, suiting),
        )
    if search.space == AUTO:
        search = replace(search, space="moves" if config.effort == "thorough" else "exact")
    settled = replace(config, quantizer=quantizer, sensitivity=sensitivity, search=search)
    return settled, notes


def _windows(asked: Estimator, suiting: type[Estimator]) -> int | None:
    """How many windows a table reads where nobody said so."""
    if asked.windows is not None or not issubclass(suiting, Fisher):
        return asked.windows
    return max(ENOUGH, asked.chunks)
