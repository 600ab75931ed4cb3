"""Optuna's own pictures of a study, as files: which parameters mattered, and what was tried."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

MOST = 8  # parameters of the landscape
FEWEST = 4  # finished trials
DOTS = 90  # an inch


def draw(study: optuna.Study) -> dict[str, bytes]:
    """PNG files by name: importances and landscape of the loss, and its history. Empty without
    matplotlib, for fronts, and where there is too little to show."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if find_spec("matplotlib") is None or len(study.directions) > 1 or len(trials) < FEWEST:
        return {}
    if np.ptp([trial.value for trial in trials]) == 0:
        return {}
    if "matplotlib.pyplot" not in sys.modules:
        import matplotlib

        matplotlib.use("Agg")  # files, no windows
    from optuna.visualization import matplotlib as plots

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental; layouts of many axes
        kept = list(optuna.importance.get_param_importances(study))[:MOST]
        return {
            "history": _png(lambda: plots.plot_optimization_history(study)),
            "importances": _png(lambda: plots.plot_param_importances(study, params=kept)),
            "landscape": _png(lambda: plots.plot_slice(study, params=kept)),
        }


def _png(plot: Callable[[], Any]) -> bytes:
    """The figure that a function of Optuna's draws."""
    from matplotlib import pyplot

    axes = plot()
    figure = np.ravel(np.asarray(axes))[0].figure
    figure.set_size_inches(max(6.0, 2.6 * np.size(axes)), 4.0)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DOTS, bbox_inches="tight")
    pyplot.close(figure)
    return file.getvalue()
