"""What each choice would cost: table[group, precision] in nats per token, with standard errors."""

from optimizer.sensitivity.estimators import (
    AutoEstimator,
    Directional,
    Estimator,
    Fisher,
    Gain,
    Hessian,
    Kronecker,
    Measured,
    Tokenwise,
    estimator,
    estimators,
)
from optimizer.sensitivity.table import (
    Desk,
    Table,
    Task,
    Text,
    agreeing,
    chunks,
    palette_columns,
    unfitting,
)

__all__ = [
    "AutoEstimator",
    "Desk",
    "Directional",
    "Estimator",
    "Fisher",
    "Gain",
    "Hessian",
    "Kronecker",
    "Measured",
    "Table",
    "Task",
    "Text",
    "Tokenwise",
    "agreeing",
    "chunks",
    "estimator",
    "estimators",
    "palette_columns",
    "unfitting",
]
