"""What a nested plan gives, measured: base and refined model on held-out text, two separate plans
of the same sizes beside them, how often the refined model would accept the base's words, and what
unpacking only the tokens that the base is unsure of leaves of its loss.

Decisions are made on the base's own reading of a text; while writing, the base reads what was unpacked
before, so that shares may differ by some per cent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.config import Optimize
from optimizer.data.text import Windows
from optimizer.errors import ModelError
from optimizer.metrics import bootstrap
from optimizer.plan import Plan, digest
from optimizer.quantization.methods import bind
from optimizer.quantization.residual import Refining
from optimizer.stages.nested import Nest
from optimizer.stages.session import SCORES, Bench, Choices

if TYPE_CHECKING:
    from torch import Tensor


VERSION = 1  # raised when a measurement changes
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
SAME = 5e-3  # of a probability: planes that are added to outputs, and to weights


def measure(bench: Bench, config: Optimize, chosen: Choices, nest: Nest, plan: Plan) -> Plan:
    """The plan whose refinement has its certificate and its thresholds."""
    assert plan.refinement is not None
    section, quantizer = plan.refinement, bind(config.quantizer, bench)
    refining = Refining(quantizer, section.planes, config.quantizer, bench)
    scores: dict[str, Any] = {
        "base": bench.score(plan.choice, "heldout", quantizer),
        "refined": bench.score(plan.choice, "heldout", refining),
    }
    if config.nested.separate:
        for name, assignment in (("base", nest.alone), ("refined", nest.separate)):
            choice = chosen.choice(assignment)
            scores[f"separate {name}"] = bench.score(choice, "heldout", quantizer)
    documents = scores["base"].documents
    counts = bootstrap.resamples(documents, np.random.default_rng(config.seed))
    certificate: dict[str, Any] = {
        "documents": len(np.unique(documents)),
        "tokens": int(scores["base"].kl.size),
        "kl": {name: asdict(bootstrap.mean(s.kl, counts)) for name, s in scores.items()},
    }
    for name in ("base", "refined"):
        if f"separate {name}" in scores:
            own, other = (
                bootstrap.means(scores[n].kl, counts) for n in (name, f"separate {name}")
            )
            value = scores[name].mean_kl / max(scores[f"separate {name}"].mean_kl, 1e-30)
            found = bootstrap.interval(value, own / np.maximum(other, 1e-30))
            certificate[f"{name} over separate"] = asdict(found)
    view = Unpacked(bench, plan, quantizer, refining)
    certificate["acceptance"] = asdict(bootstrap.mean(view.acceptance(), counts))
    hard = view.calibrate(config.nested.signal, config.nested.share)
    return replace(plan, refinement=replace(section, certificate=certificate, hard=hard))


@dataclass(frozen=True)
class Reading:
    """One text, read with planes open for some of its tokens. kl [windows, length - 1]; signals the
    same of the base; mask: which tokens were unpacked."""

    kl: np.ndarray
    mask: np.ndarray
    documents: np.ndarray

    @property
    def share(self) -> float:
        return float(self.mask.mean())


class Unpacked:
    """A nested plan's model on the bench, whose planes can be opened token by token."""

    def __init__(self, bench: Bench, plan: Plan, quantizer: Any, refining: Refining) -> None:
        self.bench, self.plan = bench, plan
        self._quantizer, self._refining = quantizer, refining

    def _kept(self, what: Any, make: Any) -> dict[str, np.ndarray]:
        real = sorted((n, p.name) for n, p in self.plan.choice.items() if p.kind != "none")
        key = digest(["unpacked", VERSION, SCORES, self._refining.key, real, what])
        found = self.bench.store.arrays("scores", key, make)
        assert found is not None
        return found

    def acceptance(self) -> np.ndarray:
        """sum_v min(p, q) of refined and base on held-out text [windows, length - 1]: how often
        speculative decoding keeps a word of the base's."""

        def make() -> dict[str, np.ndarray]:
            from optimizer.metrics.divergence import Teacher

            model, choice = self.bench.model, self.plan.choice
            stacked = self._refining.rounder(choice)
            with model.rounded(stacked, choice):
                teacher = Teacher(model.net, self.bench.windows("heldout"), own_head=True)
            with self._opened() as read:
                own = read(teacher.windows.ids[:1], True)[0, :-1]
                if (
                    float((own.softmax(-1) - teacher.log_probabilities(0).exp()).abs().max())
                    > SAME
                ):
                    raise ModelError(
                        "This model uses weights in another way than by calling the layer that holds "
                        "them, so that they can't be refined as it runs. Leave nested.size out."
                    )
                return {"ear": teacher.score(model.net).ear}

        return self._kept(["acceptance", self.bench.part_key("heldout")], make)["ear"]

    def calibrate(self, signal: str, share: float) -> dict[str, Any]:
        """Thresholds from search text, and one of them on held-out text; see `plan.schema.Hard`."""
        search = self.bench.windows("search")
        base = self.signals(search, "search", signal)
        cuts = {s: float(np.quantile(base, 1 - s)) for s in sorted({*SHARES, share})}
        ends = {0.0: float(base.max()) + 1.0, 1.0: float(base.min()) - 1.0}
        points = []
        for wanted, threshold in sorted((cuts | ends).items()):
            found = self.read(search, "search", base > threshold, [signal, threshold])
            points.append({"share": found.share, "threshold": threshold, "kl": _mean(found)})
            del wanted
        held = self.bench.windows("heldout")
        mask = self.signals(held, "heldout", signal) > cuts[share]
        found = self.read(held, "heldout", mask, [signal, cuts[share]])
        counts = bootstrap.resamples(found.documents, np.random.default_rng(0))
        heldout = {"share": found.share, "kl": asdict(bootstrap.mean(found.kl, counts))}
        return {"signal": signal, "points": points, "share": share, "heldout": heldout}

    def signals(self, windows: Windows, part: str, signal: str) -> np.ndarray:
        """Of the base [windows, length - 1], higher is less sure."""

        def make() -> dict[str, np.ndarray]:
            from optimizer.models import planes

            found: dict[str, list[Any]] = {name: [] for name in planes.SIGNALS}
            with self._opened() as read:
                for ids in self.bench.view.track(windows.ids, "what the base is unsure of"):
                    logits = read(ids[None], False)[0, :-1]
                    for name, values in found.items():
                        values.append(planes.signal(logits, name).float().cpu().numpy())
            return {name: np.array(values) for name, values in found.items()}

        return self._kept(["signals", self.bench.part_key(part)], make)[signal]

    def read(self, windows: Windows, part: str, mask: np.ndarray, what: Any) -> Reading:
        """With the planes open where `mask` [windows, length - 1] says so. what: determines it."""

        def make() -> dict[str, np.ndarray]:
            import torch

            from optimizer.metrics.divergence import Teacher, compare

            teacher = self.bench.teacher(part)
            assert isinstance(teacher, Teacher)
            found = []
            with self._opened() as read:
                rows = list(zip(windows.ids, mask, strict=True))
                for i, (ids, own) in enumerate(self.bench.view.track(rows, "unpacking")):
                    open_ = torch.from_numpy(np.append(own, False))[None]
                    log_q = torch.log_softmax(read(ids[None], open_)[0, :-1], -1)
                    target = torch.from_numpy(ids[1:]).to(log_q.device)
                    log_p = teacher.log_probabilities(i)
                    found.append(compare(log_p, log_q, target)["kl"].float().cpu().numpy())
            return {"kl": np.array(found)}

        kl = self._kept(["read", self.bench.part_key(part), what], make)["kl"]
        return Reading(kl, mask, windows.documents)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """The model with the base's weights and its planes; yields (ids [n, l], open) -> logits."""
        import torch

        from optimizer.models import planes

        bench, choice = self.bench, self.plan.choice
        assert self.plan.refinement is not None
        names = list(self.plan.refinement.layers)
        for part in ("search", "heldout"):  # the reference's, while it has its own weights
            bench.teacher(part)
        stacked = self._refining.rounder(choice)
        rounder = self._quantizer.rounder(choice)
        dense = {
            name: planes.Dense(stacked.rest(bench.model.weight(name), name)) for name in names
        }
        modules = planes.modules_of(bench.model.net, [bench.model.layers[n] for n in names])
        gate = planes.Gate()

        def read(ids: np.ndarray, open_: bool | Tensor) -> Tensor:
            net = bench.model.net
            device = next(net.parameters()).device
            gate.open = open_ if isinstance(open_, bool) else open_.to(device)
            batch = torch.from_numpy(ids).to(device)
            try:
                with torch.inference_mode():
                    logits: Tensor = net(input_ids=batch, use_cache=False).logits
            finally:  # a teacher runs the same head
                gate.open = False
            return logits.float()

        with bench.model.rounded(rounder, choice), planes.attached(modules, dense, gate):
            yield read


def _mean(found: Reading) -> float:
    return float(found.kl.mean(dtype=np.float64))
