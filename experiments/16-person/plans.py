"""Two plans of equal bytes that lose in different places: every other block at 4 and at 3 bits.

plans.py MODEL OUT. Writes OUT/even.json and OUT/odd.json; nothing is measured.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from optimizer.models.model import take_inventory
from optimizer.models.source import locate
from optimizer.plan import Plan, Precision
from optimizer.plan.plan import assemble
from optimizer.store import Store, root


def main(model: str, out: str) -> None:
    store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
    source = locate(model, Store(root(store)))
    inventory = take_inventory(source.folder)
    scope = inventory.scoped(["blocks"])
    about = {"name": model, "revision": None, "fingerprint": source.fingerprint}
    for name, first in (("even", 0), ("odd", 1)):
        choice = {
            layer.name: Precision("int", 4 if (layer.block or 0) % 2 == first else 3, 64)
            for layer in scope
        }
        plan: Plan = assemble(
            inventory, scope, choice, model=about, runtime="torch", quantizer={"name": "rtn"},
            predicted={"kl": 0.6, "stderr": 0.1},
        )  # fmt: skip
        plan.save(Path(out) / f"{name}.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
