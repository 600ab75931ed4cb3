"""What a run works with from the table on."""

from __future__ import annotations

from dataclasses import dataclass

from optimizer.config import Optimize
from optimizer.sensitivity import Table
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace


@dataclass(frozen=True)
class Prepared:
    """What is asked of which model, what may be chosen, and what that costs by the table (the mean KL
    in nats, which promises are made in). The session has the cache that plans are measured with."""

    session: Session
    config: Optimize
    space: SearchSpace
    table: Table
