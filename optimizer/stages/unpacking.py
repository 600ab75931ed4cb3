"""What a nested plan gives, measured: base and refined model on held-out text, two separate plans
of the same sizes beside them, how often the refined model would accept the base's words, and what
unpacking only the tokens that the base is unsure of leaves of its loss.

Decisions are made on the base's own reading of a text; while writing, the base reads what was unpacked
before, so that shares may differ by some per cent. A prompt is read with the planes while writing,
and not here: a text counts from its first word.
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
from optimizer.stages.keys import ScoresKey
from optimizer.stages.nested import Nest
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace

if TYPE_CHECKING:
    from torch import Tensor

    from optimizer.models.planes import Signal


VERSION = 2  # raised when a measurement changes
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
FITTED = 8192  # tokens that a probe is fitted to
RIDGE = 0.1  # of the inputs' variances
LEAST = 1e-4  # nats: losses below are alike to a probe
SAME = 5e-3  # of a probability: planes that are added to outputs, and to weights


def measure(
    session: Session, config: Optimize, space: SearchSpace, nest: Nest, plan: Plan
) -> Plan:
    """The plan whose refinement has its certificate and its thresholds."""
    assert plan.refinement is not None
    section, quantizer = plan.refinement, bind(config.quantizer, session)
    refining = Refining(quantizer, section.planes, config.quantizer, session)
    scores: dict[str, Any] = {
        "base": session.score(plan.choice, "heldout", quantizer),
        "refined": session.score(plan.choice, "heldout", refining),
    }
    if config.nested.separate:
        for name, assignment in (("base", nest.alone), ("refined", nest.separate)):
            choice = space.choice(assignment)
            scores[f"separate {name}"] = session.score(choice, "heldout", quantizer)
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
    view = Unpacked(session, plan, quantizer, refining)
    certificate["acceptance"] = asdict(bootstrap.mean(view.acceptance(), counts))
    hard: dict[str, Any] = {}
    if view.catches_up():
        hard = view.calibrate(config.nested.signal, config.nested.share)
    else:
        session.view.note(
            "unpack=hard is not offered: this architecture takes no attention mask of ours, so that "
            "what it would do to a text can't be measured. draft, always and never are."
        )
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
    """A nested plan's model in its session, whose planes can be opened token by token."""

    def __init__(self, session: Session, plan: Plan, quantizer: Any, refining: Refining) -> None:
        self.session, self.plan = session, plan
        self._quantizer, self._refining = quantizer, refining

    def _kept(self, what: Any, make: Any) -> dict[str, np.ndarray]:
        real = sorted((n, p.name) for n, p in self.plan.choice.items() if p.kind != "none")
        key = digest(["unpacked", VERSION, ScoresKey.VERSION, self._refining.key, real, what])
        found = self.session.store.arrays("scores", key, make)
        assert found is not None
        return found

    def acceptance(self) -> np.ndarray:
        """sum_v min(p, q) of refined and base on held-out text [windows, length - 1]: how often
        speculative decoding keeps a word of the base's."""

        def make() -> dict[str, np.ndarray]:
            from optimizer.metrics.divergence import Teacher
            from optimizer.models.head import OwnHead

            model, choice = self.session.model, self.plan.choice
            stacked = self._refining.rounder(choice)
            with model.rounded(stacked, choice):
                teacher = Teacher(model.net, self.session.windows("heldout"), OwnHead(model.net))
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

        return self._kept(["acceptance", self.session.part_key("heldout")], make)["ear"]

    def catches_up(self) -> bool:
        """Whether `planes.caught_up` says of this model what its own passes say, at both ends."""
        import torch

        ids = self.session.windows("search").ids[:1]
        with self._opened() as read:
            for open_ in (False, True):
                try:
                    found = read(ids, torch.full(ids.shape, open_))
                except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
                    return False
                far = (found.softmax(-1) - read(ids, open_).softmax(-1)).abs().max()
                if not float(far) < SAME:
                    return False
        return True

    def calibrate(self, kind: str, share: float) -> dict[str, Any]:
        """Thresholds from search text, and one of them on held-out text; see `plan.schema.Hard`."""
        search, signal = self.session.windows("search"), self.signal(kind)
        base = self.signals(search, "search", signal)
        cuts = {s: float(np.quantile(base, 1 - s)) for s in sorted({*SHARES, share})}
        ends = {0.0: float(base.max()) + 1.0, 1.0: float(base.min()) - 1.0}
        points = []
        for wanted, threshold in sorted((cuts | ends).items()):
            found = self.read(search, "search", base > threshold, [kind, threshold])
            points.append({"share": found.share, "threshold": threshold, "kl": _mean(found)})
            del wanted
        held = self.session.windows("heldout")
        mask = self.signals(held, "heldout", signal) > cuts[share]
        found = self.read(held, "heldout", mask, [kind, cuts[share]])
        counts = bootstrap.resamples(found.documents, np.random.default_rng(0))
        heldout = {"share": found.share, "kl": asdict(bootstrap.mean(found.kl, counts))}
        known = {"signal": kind, "weights": list(signal.weights), "bias": signal.bias}
        return known | {"points": points, "share": share, "heldout": heldout}

    def signals(self, windows: Windows, part: str, signal: Signal) -> np.ndarray:
        """Of the base [windows, length - 1], higher is less sure."""

        def make() -> dict[str, np.ndarray]:
            from optimizer.models import planes

            values = []
            with self._opened() as read, planes.watched(self.session.model.net) as seen:
                for ids in self.session.view.track(windows.ids, "what the base is unsure of"):
                    logits = read(ids[None], False)[0, :-1]
                    values.append(signal(logits, seen[0][0, :-1]).float().cpu().numpy())
            return {"signal": np.array(values)}

        what = [signal.kind, *signal.weights, signal.bias]
        return self._kept(["signals", self.session.part_key(part), what], make)["signal"]

    def signal(self, kind: str) -> Signal:
        """A probe is fitted on calibration text: ridge regression of the log of the base's loss."""
        from optimizer.models import planes

        if kind != "probe":
            return planes.Signal(kind)
        length = self.session.windows("calibration").ids.shape[1]
        windows = self.session.windows("calibration").head(max(1, FITTED // length))

        def make() -> dict[str, np.ndarray]:
            from scipy import linalg

            inputs, losses = self._known(windows)
            centre, scale = inputs.mean(0), inputs.std(0) + 1e-6
            x, y = (inputs - centre) / scale, np.log(losses + LEAST)
            gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
            found = linalg.solve(gram, x.T @ (y - y.mean()), assume_a="pos") / scale
            return {"weights": np.append(found, y.mean() - centre @ found)}

        kept = self._kept(["probe", self.session.key_of(windows)], make)["weights"]
        *weights, bias = (float(f"{x:.7g}") for x in kept)
        return planes.Signal(kind, tuple(weights), bias)

    def _known(self, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
        """What a probe looks at [tokens, inputs], and the base's loss [tokens], nats."""
        import torch

        from optimizer.metrics.divergence import Teacher, compare
        from optimizer.models import planes

        session = self.session
        teacher = Teacher(session.model.net, windows, session.model.own_head)
        inputs, losses = [], []
        with self._opened() as read, planes.watched(session.model.net) as seen:
            for i, ids in enumerate(session.view.track(windows.ids, "where the base fails")):
                logits = read(ids[None], False)[0, :-1]
                inputs.append(planes.features(logits, seen[0][0, :-1]).cpu().numpy())
                log_q, log_p = torch.log_softmax(logits, -1), teacher.log_probabilities(i)
                target = torch.from_numpy(ids[1:]).to(log_q.device)
                losses.append(compare(log_p, log_q, target)["kl"].double().cpu().numpy())
        return np.concatenate(inputs).astype(np.float64), np.concatenate(losses).clip(0)

    def read(self, windows: Windows, part: str, mask: np.ndarray, what: Any) -> Reading:
        """With the planes open where `mask` [windows, length - 1] says so. what: determines it."""

        def make() -> dict[str, np.ndarray]:
            import torch

            from optimizer.metrics.divergence import Teacher, compare

            teacher = self.session.teacher(part)
            assert isinstance(teacher, Teacher)
            found = []
            with self._opened() as read:
                rows = list(zip(windows.ids, mask, strict=True))
                for i, (ids, own) in enumerate(self.session.view.track(rows, "unpacking")):
                    open_ = torch.from_numpy(np.append(own, False))[None]
                    log_q = torch.log_softmax(read(ids[None], open_)[0, :-1], -1)
                    target = torch.from_numpy(ids[1:]).to(log_q.device)
                    log_p = teacher.log_probabilities(i)
                    found.append(compare(log_p, log_q, target)["kl"].float().cpu().numpy())
            return {"kl": np.array(found)}

        kl = self._kept(["read", self.session.part_key(part), what], make)["kl"]
        return Reading(kl, mask, windows.documents)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """The model with the base's weights and its planes; yields (ids [n, l], open) -> logits."""
        import torch

        from optimizer.models import planes

        session, choice = self.session, self.plan.choice
        assert self.plan.refinement is not None
        names = list(self.plan.refinement.layers)
        for part in ("search", "heldout"):  # the reference's, while it has its own weights
            session.teacher(part)
        stacked = self._refining.rounder(choice)
        rounder = self._quantizer.rounder(choice)
        dense = {
            name: planes.Dense(stacked.rest(session.model.weight(name), name)) for name in names
        }
        modules = planes.modules_of(session.model.net, [session.model.layers[n] for n in names])
        gate = planes.Gate()

        def read(ids: np.ndarray, open_: bool | Tensor) -> Tensor:
            net = session.model.net
            device, dtype = (getattr(next(net.parameters()), k) for k in ("device", "dtype"))
            batch = torch.from_numpy(ids).to(device)
            with torch.inference_mode():
                if not isinstance(open_, bool):
                    return planes.caught_up(net, gate, batch, open_.to(device), dtype)[0].float()
                gate.open = open_
                try:
                    logits: Tensor = net(input_ids=batch, use_cache=False).logits
                finally:  # a teacher runs the same head
                    gate.open = False
            return logits.float()

        with session.model.rounded(rounder, choice), planes.attached(modules, dense, gate):
            yield read


def _mean(found: Reading) -> float:
    return float(found.kl.mean(dtype=np.float64))
