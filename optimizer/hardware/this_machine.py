"""The machine that the program runs on, as a budget: its graphics card's memory, else its own.

Standard library and psutil; no torch, so that an answer takes no longer than a process.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from optimizer.errors import BudgetError
from optimizer.plan import Budget

# shares that a program can have, as in the presets for cards, Macs and computers
USABLE = {"gpu": 0.96, "apple": 0.66, "cpu": 0.75}
CGROUP = Path("/sys/fs/cgroup/memory.max")
SECONDS = 10  # for nvidia-smi


def this_machine(
    card: Callable[[], tuple[str, int] | None] | None = None,
    memory: Callable[[], int] | None = None,
) -> Budget:
    """Its memory as a budget without a context. Raises BudgetError where none is found. card,
    memory: in their place, what looks for a graphics card (name, bytes) and for main memory."""
    found = (card or _card)()
    if found is not None:
        name, size = found
        return Budget(memory=str(size), usable=USABLE["gpu"], machine="gpu", device=f"this {name}")
    size = (memory or _memory)()
    if size <= 0:
        raise BudgetError(
            "How much memory this machine has couldn't be found out. Give a budget: budget.size=80MB, "
            "or a machine, budget=laptop16gb."
        )
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    kind = "apple" if apple else "cpu"
    return Budget(memory=str(size), usable=USABLE[kind], machine=kind, device="this machine")


def _card() -> tuple[str, int] | None:
    """The largest NVIDIA card, (name, bytes); None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(  # noqa: S603  (a fixed question)
            asked, capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = []
    for line in done.stdout.splitlines():
        size, _, name = line.partition(",")
        if size.strip().isdigit():
            found.append((name.strip(), int(size) * 2**20))
    return max(found, key=lambda one: one[1], default=None)


def _memory() -> int:
    """Main memory, or less where a container may have less; 0: not known."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        limit = CGROUP.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return total
    return min(total, int(limit)) if limit.isdigit() else total
