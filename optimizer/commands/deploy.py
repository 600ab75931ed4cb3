"""What happens with a finished plan: packing the model that it describes, measuring the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.config import Evaluate
from optimizer.data.text import Data, Part
from optimizer.errors import ConfigError, MezzotintError, PlanError
from optimizer.hardware import throughput
from optimizer.hardware.memory import kind_of
from optimizer.hardware.throughput import Speed
from optimizer.models.source import Source, context_length, is_encoder, locate
from optimizer.plan import Inventory, Plan
from optimizer.plan.certificate import Evaluation, Row
from optimizer.quantization.methods import bind, of_plan
from optimizer.stages import certify
from optimizer.stages.session import Session
from optimizer.stages.view import View
from optimizer.store import Store

if TYPE_CHECKING:
    from optimizer.commands.harness import Paired
    from optimizer.formats.torch import packed
    from optimizer.formats.torch.modes import Unpacking
    from optimizer.metrics.divergence import AnyScores
    from optimizer.models.model import Model


SPOT = 2  # windows that a packed model reads where its plan's scores are in the store
SAME = 1e-4  # nats, and as a share: sums in another order


def apply(
    plan: Plan,
    out: Path,
    store: str,
    model: str | None = None,
    overwrite: bool = False,
    view: View | None = None,
) -> Path:
    """Pack the plan's model into the folder `out`. Raises before any work if it can't be done.

    model: where the reference is, if no longer where the plan says.
    """
    from optimizer.formats.folder import check_room
    from optimizer.formats.torch import packed
    from optimizer.models.model import Model

    view = view or View()
    packed.check_target(out, overwrite)
    refinement = 0 if plan.refinement is None else plan.refinement.bytes["total"]
    check_room(out, plan.bytes["total"] + refinement)
    kept = Store.open(store, view.note)
    source, inventory = reference_of(plan, model, kept)
    check_names(plan, inventory)
    encoder = codes_of(plan, source, inventory, kept, view)
    refining = None if plan.refinement is None else planes_of(plan, source, inventory, kept, view)
    view.stage("loading the reference")
    reference = Model.load(source.folder, inventory, full=False)
    packed.save(plan, reference, source.folder, out, view.track, encoder, refining)
    return out


def planes_of(
    plan: Plan, source: Source, inventory: Inventory, store: Store, view: View
) -> packed.Refiner:
    """What gives the refined layers their planes, as `codes_of` does for the base."""
    from optimizer.quantization.residual import Refining

    assert plan.refinement is not None
    settings = of_plan(plan.quantizer)
    recipe = Recipe(plan, source, inventory, store, view)
    refining = Refining(bind(settings, recipe), plan.refinement.planes, settings, recipe)
    return refining.rounder(plan.choice)


def codes_of(
    plan: Plan, source: Source, inventory: Inventory, store: Store, view: View
) -> packed.Encoder:
    """What gives every layer of the plan its codes: the very ones that were certified. They are
    in the store, or made again from the same tokens. Raises PlanError if those are gone."""
    encoder: packed.Encoder = quantizer_of(plan, source, inventory, store, view).rounder(
        plan.choice
    )
    return encoder


def quantizer_of(
    plan: Plan, source: Source, inventory: Inventory, store: Store, view: View
) -> Any:
    """The plan's quantizer, bound to its own model and calibration tokens."""
    return bind(of_plan(plan.quantizer), Recipe(plan, source, inventory, store, view))


class Recipe:
    """A plan's model and calibration tokens; see `rounding.Material`."""

    def __init__(
        self, plan: Plan, source: Source, inventory: Inventory, store: Store, view: View
    ) -> None:
        self._plan, self._source, self._view = plan, source, view
        self.inventory, self.store = inventory, store

    @property
    def calibration_key(self) -> str:
        key = self._plan.quantizer.get("tokens")
        if not key:
            raise PlanError(
                f"A plan for {self._plan.quantizer['name']} names its calibration tokens "
                "(quantizer.tokens), and this one doesn't. Make it again, or change its quantizer "
                "to rtn."
            )
        return str(key)

    @cached_property
    def model(self) -> Model:
        from optimizer.models.model import Model

        self._view.stage("loading the reference")
        return Model.load(self._source.folder, self.inventory)

    def calibration(self) -> np.ndarray:
        settings = dict(self._plan.provenance.get("data", {}))
        parts = {k: Part(**v) for k, v in settings.items() if isinstance(v, dict)}
        data = Data(**(settings | parts))
        revision = self._plan.model.get("revision")
        session = Session.open(
            self._source.name,
            data,
            str(self.store.root),
            self._view,
            revision=revision,
            # which may have to write its text again; a text of one's own is looked at before
            model=self.model if data.source in ("self", "bundled") else None,
        )
        if session.calibration_key != self.calibration_key:
            raise PlanError(
                f"A plan's codes come from its own calibration tokens. The text at {data.path} "
                "isn't the one that this plan was made with. Put that text back, or make a plan "
                "with this one."
            )
        return session.calibration()

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        return self._view.track(items, text)

    def note(self, text: str) -> None:
        self._view.note(text)


def reference_of(plan: Plan, name: str | None, store: Store) -> tuple[Source, Inventory]:
    """The model that the plan was made for. Raises PlanError if another one is given."""
    from optimizer.models.model import take_inventory

    wanted = plan.model.get("fingerprint")
    source = locate(name or str(plan.model["name"]), store, plan.model.get("revision"))
    if wanted and source.fingerprint != wanted:
        raise PlanError(
            f"A plan fits one model only. This one was made for {plan.model['name']} "
            f"({str(wanted)[:19]}), and {source.name} is another ({source.fingerprint[:19]}). Give "
            "the model that it was made for, or make a plan for this one."
        )
    return source, take_inventory(source.folder)


def check_language_model(source: Source, command: str) -> None:
    """Raise ConfigError for an encoder, where only a model that predicts tokens will do."""
    if is_encoder(source.folder):
        raise ConfigError(
            f"`mezzotint {command}` needs a language model, and {source.name} is an encoder. For an "
            "encoder there are optimize, show, apply, evaluate, report and compare."
        )


def check_names(plan: Plan, inventory: Inventory) -> None:
    """Raise PlanError unless plan and model name the same layers in the same shapes."""
    have = {layer.name: (layer.rows, layer.cols) for layer in inventory.layers}
    for name in plan.layers:
        if name not in have:
            raise PlanError(
                f"The plan names the layer {name}, which the model doesn't have. Correct the name "
                "or make the plan again."
            )
    for name, shape in have.items():
        if name not in plan.layers:
            raise PlanError(f"The plan says nothing about the layer {name}. Make it again.")
        if plan.shapes and plan.shapes.get(name) != shape:
            raise PlanError(f"The plan has another shape for {name} than the model's {shape}.")
        if not plan.choice[name].fits(shape[1]):
            raise PlanError(
                f"{plan.layers[name]} doesn't divide the {shape[1]} columns of {name}. Choose "
                "another precision for it."
            )


@dataclass(frozen=True)
class Evaluated:
    """A packed model beside its reference on held-out text. bytes: of its files, with planes that were
    used; unpack: what was done with them, None without any; row: of the packed model; tasks,
    refusals: where they were asked for."""

    plan: Plan
    bytes: int
    unpack: str | None
    documents: int
    tokens: int
    row: Row
    meaning: Evaluation
    speed: Speed | None
    hourly_rate: float | None
    tasks: Sequence[Paired] = ()
    refusals: Sequence[Paired] = ()


def evaluate(config: Evaluate, view: View | None = None) -> Evaluated:
    """Reference against packed, on held-out windows of the given text."""
    from optimizer.certificate import comparison
    from optimizer.formats.torch import packed
    from optimizer.metrics import bootstrap
    from optimizer.models.kv_cache import rounded

    config.check()
    view = view or View()
    folder = Path(config.model)
    plan = packed.verify(folder, whole=config.unpack != "never")
    mode = _unpacking(config).settle(plan, folder)
    session = Session.open(
        config.reference or str(plan.model["name"]),
        _read(config, plan),
        config.store,
        view,
        revision=plan.model.get("revision"),
        device=config.device,
        residence=config.residence,
    )
    if session.source.fingerprint != plan.model.get("fingerprint", session.source.fingerprint):
        reference_of(plan, config.reference, session.store)
    tuned = plan.provenance.get("tuned", {}).get("domains", [])
    if config.speed:
        _check_speed(config, session)
    entries = (
        config.domains if mode != "hard" else []
    )  # whose windows are read without full logits
    asked = certify.Asked(config.tolerance, entries, config.generate, 0, tuned)
    tokenizer = _asking(config, session)  # before texts are read, or sampled
    certify.check(session, asked)
    # many words, one by one
    writes = bool(config.task_names or config.refusals or config.generate)
    way = _unpacking(config)
    net = packed.load(folder, device=config.device, steady=True, unpacking=way, once=writes)
    with rounded(net, kind_of(plan)):
        kept = mode == "never" and not config.again
        scores = _certified(session, plan, net) if kept else None
        if scores is None:
            view.stage("the reference reads")
            teacher = session.teacher("heldout")
            view.stage("the packed model reads")
            scores = _token_by_token(teacher, net) if mode == "hard" else teacher.score(net)
    weights = certify.Weights(None, lambda: nullcontext(net), kind_of(plan))
    counts = bootstrap.resamples(scores.documents, np.random.default_rng(0))
    return Evaluated(
        plan=plan,
        bytes=plan.bytes["total"] + _refinement(plan, mode),
        unpack=None if plan.refinement is None else mode,
        documents=len(np.unique(scores.documents)),
        tokens=int(scores.kl.size),
        row=Row("packed", **comparison.describe(scores, counts)),
        meaning=certify.judge(session, weights, scores, asked),
        speed=_speed(config, plan, session, view) if config.speed else None,
        hourly_rate=config.hourly_rate,
        **_asked(config, plan, {"reference": session.model.net, "packed": net}, tokenizer, view),
    )


def _unpacking(config: Evaluate) -> Unpacking:
    from optimizer.formats.torch.modes import Unpacking

    return Unpacking(config.unpack, config.share)


def _refinement(plan: Plan, mode: str) -> int:
    return 0 if plan.refinement is None or mode == "never" else plan.refinement.bytes["total"]


def _token_by_token(teacher: Any, net: Any) -> AnyScores:
    """The scores of a model that decides at each token, which must see all of its predictions."""
    from optimizer.metrics.divergence import COLUMNS, Scores, compare

    columns: dict[str, list[Any]] = {key: [] for key in COLUMNS}
    for pair in teacher.whole_pairs(net):
        for key, value in compare(*pair).items():
            columns[key].append(value.float().cpu().numpy())
    arrays = {key: np.array(values) for key, values in columns.items()}
    return Scores(**arrays, documents=teacher.windows.documents)


def _asking(config: Evaluate, session: Session) -> Any:
    """The tokenizer, if questions will be asked; what can be wrong with them ends here."""
    from optimizer.commands import harness
    from optimizer.models.tokenizer import load_tokenizer

    if not config.task_names and not config.refusals:
        return None
    if session.encoder:
        raise ConfigError("tasks and refusals are for language models, and this is an encoder.")
    harness.check(config.task_names)
    tokenizer = load_tokenizer(session.source.folder)
    if config.refusals:
        harness.check_template(tokenizer, session.source.name)
    return tokenizer


def _asked(
    config: Evaluate, plan: Plan, nets: dict[str, Any], tokenizer: Any, view: View
) -> dict[str, list[Paired]]:
    """What both models answer: to tasks, and to prompts that may be refused."""
    from optimizer.commands import harness
    from optimizer.models.kv_cache import rounded

    found: dict[str, list[Paired]] = {}
    with rounded(nets["packed"], kind_of(plan)):
        if config.task_names:
            found["tasks"] = harness.compare(
                nets, tokenizer, config.task_names, config.limit, view.track
            )
        if config.refusals:
            found["refusals"] = harness.compare_refusals(nets, tokenizer, view.track)
    return found


def _read(config: Evaluate, plan: Plan) -> Data:
    """The text that was asked for; if none was, the one that the plan was certified on."""
    if config.data != Data():
        return config.data
    try:
        own = dict(plan.provenance.get("data", {}))
        own |= {name: Part(**own[name]) for name in config.data.parts if name in own}
        found = Data(**own)
        found.check(None)
    except (TypeError, MezzotintError):  # of another version, or a text that is gone
        return config.data
    return found


def _certified(session: Session, plan: Plan, net: Any) -> AnyScores | None:
    """The scores of this very plan on these windows, if the store has them and the packed model gives
    the same on the first SPOT windows; else None."""
    from optimizer.metrics import divergence

    kept = session.store.arrays("scores", certify.certified(session, plan))
    if kept is None:
        return None
    stored, few = divergence.stored(kept), session.windows("heldout").head(SPOT)
    session.view.stage(f"the packed model reads {SPOT} windows that its plan was certified on")
    own = divergence.teacher(session.model, few).score(net)
    if np.allclose(own.kl, stored.kl[: len(own.kl)], rtol=SAME, atol=SAME):
        session.view.note(
            f"Its scores on {SPOT} windows are those of its plan, so the certificate's are used for "
            "the others; again=true measures all of them again."
        )
        return stored
    session.view.note(
        "Its scores there aren't those of its plan, so everything is measured again."
    )
    return None


def _check_speed(config: Evaluate, session: Session) -> None:
    if session.encoder:
        raise ConfigError(
            f"speed={config.speed} times how fast text is written, and an encoder writes none. Leave "
            "it out."
        )
    context = context_length(session.source.folder)
    prompt = min(throughput.PROMPT, config.data.heldout.length)
    if context is not None and prompt + config.speed > context:
        raise ConfigError(
            f"A prompt of {prompt} tokens and speed={config.speed} more must fit the model's context "
            f"of {context} tokens. Lower speed."
        )


def _speed(config: Evaluate, plan: Plan, session: Session, view: View) -> Speed:
    """Of the model as `optimizer.load` gives it, which multiplies packed where it can."""
    from transformers import DynamicCache

    from optimizer.formats.torch import packed
    from optimizer.models.kv_cache import BITS, Cache

    net = packed.load(
        Path(config.model),
        None,
        config.device,
        fast=True,
        steady=True,
        unpacking=_unpacking(config),
    )

    def cache(model: Any) -> Any:
        if model is net and plan.kv in BITS:
            return Cache(net.config, kind_of(plan))
        return DynamicCache(config=model.config)

    ids = session.windows("heldout").ids[0]
    track = partial(view.track, text=f"both write {config.speed} tokens")
    return throughput.measure(net, session.model.net, ids, config.speed, cache, track)
