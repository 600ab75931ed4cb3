"""`mezzotint export to=gguf nested=true`: two GGUF files for llama.cpp's speculative decoding.

The draft is the base, in block types that hold its levels exactly. The target is the refined model: no
block type holds base and plane together, so its refined layers are stored as q8_0, 8.5 bits a weight,
whatever they take in our own folder. llama.cpp holds both files whole; it reads no planes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.commands import export
from optimizer.commands.deploy import codes_of, planes_of
from optimizer.config import Export
from optimizer.errors import ConfigError
from optimizer.formats import folder as folders
from optimizer.formats.gguf.writer import carrier
from optimizer.formats.model_card import card
from optimizer.formats.rules import Verdict
from optimizer.plan import Inventory, Plan, Precision
from optimizer.plan.plan import assemble
from optimizer.stages.view import View
from optimizer.store import Store

if TYPE_CHECKING:
    from torch import Tensor

DRAFT, TARGET = "draft", "target"
STORED = Precision.ggml("q8_0")
CARD = """# A draft and a target for llama.cpp's speculative decoding

`{draft}` is the base of plan {id}, `{target}` the refined model, its refined layers stored as q8_0.
The target writes its own text; the draft only proposes words, which it checks several at a time.
Versions of llama.cpp before 2026 say --draft-max 8 for the last two options.

    llama-server -m {target} -md {draft} --spec-type draft-simple --spec-draft-n-max 8
"""


def export_pair(plan: Plan, asked: Export, view: View) -> Verdict:
    """Write draft/model.gguf and target/model.gguf in the folder that is asked for. Raises before any
    work if the plan has no refinement, or if a GGUF file can't hold the base."""
    out = Path(asked.out)
    folders.check_target(out, asked.overwrite)
    if export.ALIASES.get(asked.to, asked.to) != "llamacpp":
        raise ConfigError(
            f"nested=true writes for llama.cpp, to=gguf, not to={asked.to}. Leave it out."
        )
    if asked.activations:
        raise ConfigError("activations=true is for to=vllm, not beside nested=true. Leave it out.")
    if plan.refinement is None:
        raise ConfigError(
            "nested=true writes a base and a refined model, and this plan has no refinement. Make one "
            "with nested.size=SIZE, or leave nested out."
        )
    own = export.job_of("export", plan, "llamacpp", asked.store, asked.model, asked.gguf)
    job = replace(own, nested=False)
    _check_levels(job)
    verdicts = {DRAFT: job.check()}
    verdicts[DRAFT].require()
    kept = Store.open(asked.store, view.note)
    jobs = {DRAFT: job, TARGET: replace(job, plan=target_of(plan, job.inventory))}
    verdicts[TARGET] = jobs[TARGET].check()
    verdicts[TARGET].require()
    tensors = _stored(plan, job, kept, view)

    def fill(draft: Path) -> None:
        for name, one in jobs.items():
            view.stage(f"writing the {name}")
            (draft / name).mkdir()
            one.format.write(one.plan, one.subject, tensors[name], draft / name)
            export.compare(one, tensors[name], draft / name, verdicts[name])
            text = card(one.plan, verdicts[name], one.format.run)
            (draft / name / "README.md").write_text(text, encoding="utf-8")
            folders.seal(one.plan, draft / name, {"engine": one.engine})
        names = {name: f"{name}/{one.format.file}" for name, one in jobs.items()}
        (draft / "README.md").write_text(CARD.format(id=plan.id, **names), encoding="utf-8")

    folders.publish(out, fill)
    sizes = [verdict.bytes or 0 for verdict in verdicts.values()]
    notes = (*verdicts[DRAFT].notes, f"The draft takes {sizes[0]} bytes, the target {sizes[1]}.")
    return replace(verdicts[TARGET], notes=notes, bytes=sum(sizes))


def _check_levels(job: export.Job) -> None:
    """Raises ConfigError unless ggml has a block type with the levels of every layer of the base."""
    choice = job.plan.choice
    lacking = [
        layer.name
        for layer in job.inventory.layers
        if choice[layer.name].kind != "none" and carrier(choice[layer.name], layer.cols) is None
    ]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ConfigError(
            f"A GGUF file can't hold this plan's base: no block type has the levels of "
            f"{choice[lacking[0]].name}, which it gives to {lacking[0]}{more}. Make the plan with "
            "palette.bits=[4,5,8,16] palette.symmetric=true, whose levels ggml has."
        )


def target_of(plan: Plan, inventory: Inventory) -> Plan:
    """The refined model as a plan of its own."""
    assert plan.refinement is not None
    refined = dict.fromkeys(plan.refinement.layers, STORED)
    inside = set(plan.scope)
    return assemble(
        inventory,
        [layer for layer in inventory.layers if layer.name in inside],
        plan.choice | refined,
        model=plan.model,
        runtime="llamacpp",
        quantizer=plan.quantizer,
        predicted={"estimator": "", **plan.refinement.predicted},
        kv=plan.kv,
        keep=plan.keep,
        budget=plan.budget,
    )


def _stored(plan: Plan, job: export.Job, store: Store, view: View) -> dict[str, dict[str, Tensor]]:
    """The stored tensors of both."""
    from optimizer.models.model import Model
    from optimizer.quantization.ggml import encode
    from optimizer.quantization.uniform import Codes

    found = (plan, job.source, job.inventory, store, view)
    base, planes = codes_of(*found), planes_of(*found)
    view.stage("loading the reference")
    reference = Model.load(job.source.folder, job.inventory, full=False)
    tensors: dict[str, dict[str, Tensor]] = {DRAFT: {}, TARGET: {}}
    assert plan.refinement is not None
    for name in view.track(list(_rounded(plan)), "base and refined model"):
        weight = reference.weight(name)
        codes = base.encode(weight, plan.choice[name], name)
        parts = {f"{name}.{suffix}": value for suffix, value in codes.pack().items()}
        tensors[DRAFT] |= parts
        if name in plan.refinement.layers:
            assert isinstance(codes, Codes)  # a plane goes on from its base's group scales
            refined = codes.decode() + planes.plane(weight, name).decode(codes.scales)
            packed = encode(refined, STORED).pack()
            parts = {f"{name}.{suffix}": value for suffix, value in packed.items()}
        tensors[TARGET] |= parts
    return tensors


def _rounded(plan: Plan) -> Iterator[str]:
    return (name for name, precision in plan.choice.items() if precision.kind != "none")
