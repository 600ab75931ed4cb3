"""`mezzotint export` and `mezzotint check`: a plan as the files of another engine.

Check first, write into a draft, read the draft back with the format's own rules, compare every
weight with the plan's, and only then show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from optimizer import untrusted
from optimizer.commands.deploy import check_language_model, check_names, codes_of, reference_of
from optimizer.config import profile
from optimizer.data import pairs
from optimizer.errors import ConfigError, ModelError, PlanError
from optimizer.formats import lm_eval, mlx, recipes, registry
from optimizer.formats.format import Format, Recipe, Subject, format_of, formats
from optimizer.formats.model_card import card
from optimizer.formats.rules import Verdict
from optimizer.formats.safetensors.loader import loading
from optimizer.models.source import Source, packed_file
from optimizer.plan import Inventory, Plan, Precision
from optimizer.stages.view import View
from optimizer.store import Store

if TYPE_CHECKING:
    from torch import Tensor

ALIASES = {"compressed-tensors": "vllm", "gguf": "llamacpp"}
HARNESS = "lm-eval"  # our probes as its tasks; the plan says nothing about them
BASE_ALONE = (
    "The plan's refinement stays behind, since only `optimizer.load` unpacks one: this is the "
    "base alone."
)
RECIPES = {"llm-compressor": "vllm", "llama-quantize": "llamacpp"}


@dataclass(frozen=True)
class Job:
    """A plan, the model that it is for, and where it goes."""

    plan: Plan
    source: Source
    inventory: Inventory
    engine: str
    base: Any = None  # see `Format.base`
    refused: str | None = None  # why there is no base
    nested: bool = False  # the plan had a refinement, which no engine reads
    activations: bool = False  # see `Subject`

    @property
    def subject(self) -> Subject:
        return Subject(self.inventory, self.source.folder, self.base, self.activations)

    @property
    def format(self) -> Format:
        return format_of(self.engine)

    def check(self) -> Verdict:
        if self.refused is not None:
            return Verdict(self.engine, (self.refused,))
        found = registry.check(self.plan, profile(self.engine), self.subject)
        return replace(found, notes=(*found.notes, BASE_ALONE)) if self.nested else found


def check(
    plan: Plan, to: str, store: str, model: str | None = None, gguf: str | None = None
) -> Verdict:
    """Would the engine load and run it? gguf: a 16-bit GGUF file of the model, for to=gguf, instead of
    the one that llama.cpp's converter makes. Raises only if the question itself is wrong."""
    return job_of("check", plan, to, store, model, gguf).check()


def job_of(
    command: str, plan: Plan, to: str, store: str, model: str | None, gguf: str | None
) -> Job:
    known = {name: name for name in formats()} | ALIASES | RECIPES
    if to not in known:
        names = [*known, *([HARNESS] if command == "export" else [])]
        raise ConfigError(f"to= is one of {', '.join(names)}, not {to!r}.")
    kept = Store.open(store)
    source, inventory = reference_of(plan, model, kept)
    if to != "torch":
        check_language_model(source, command)
    check_names(plan, inventory)
    nested, plan = plan.refinement is not None, replace(plan, refinement=None)
    try:
        base = registry.base_of(profile(known[to]), source, inventory, kept, gguf)
    except ModelError as error:
        return Job(plan, source, inventory, known[to], None, str(error), nested)
    return Job(plan, source, inventory, known[to], base, nested=nested)


def export(
    plan: Plan,
    to: str,
    out: Path,
    store: str,
    model: str | None = None,
    overwrite: bool = False,
    packed: Path | None = None,
    view: View | None = None,
    gguf: str | None = None,
    activations: bool = False,
) -> Verdict:
    """Write the plan's model for the engine `to` into the folder `out`.

    packed: a folder that `apply` wrote; its rounded weights are taken as they are, so that nothing
    is rounded again. gguf: as in `check`. activations: see `Subject`. Raises before any work if the
    engine wouldn't load or execute the plan.
    """
    from optimizer.formats import folder as folders

    view = view or View()
    folders.check_target(out, overwrite)
    if to == HARNESS:
        folders.publish(out, lambda draft: lm_eval.write(pairs.built_in(), draft, out))
        return Verdict(to)
    job = replace(job_of("export", plan, to, store, model, gguf), activations=activations)
    if activations and job.engine != "vllm":
        raise ConfigError(f"activations=true is for to=vllm, not for {to!r}. Leave it out.")
    plan = job.plan
    verdict = job.check()
    verdict.require()
    if to in RECIPES or isinstance(job.format, Recipe):
        folders.publish(out, lambda draft: _recipe(job, to, draft))
        return verdict
    tensors = _stored(job, packed, Store.open(store, view.note), view)

    readers: list[str] = []

    def fill(draft: Path) -> None:
        view.stage(f"writing for {job.engine}")
        job.format.write(plan, job.subject, tensors, draft)
        view.stage("reading it back")
        own = compare(job, tensors, draft, verdict)
        if job.engine == "torch":  # with its card and its manifest already
            return
        readers.extend(_read_back(job, tensors, own, draft))
        found = replace(verdict, readers=tuple(readers))
        (draft / "README.md").write_text(card(plan, found, job.format.run), encoding="utf-8")
        folders.seal(plan, draft, {"engine": job.engine})

    folders.publish(out, fill)
    return replace(verdict, readers=tuple(readers))


def _recipe(job: Job, to: str, draft: Path) -> None:
    from optimizer.formats import folder as folders

    if to == "llama-quantize":
        assert job.base is not None
        recipes.llama_quantize(job.plan, job.inventory, job.base, draft)
    elif to == "llm-compressor":
        recipes.llm_compressor(job.plan, job.inventory, draft)
    else:
        job.format.write(job.plan, job.subject, {}, draft)
    folders.seal(job.plan, draft, {"recipe": to})


def _stored(job: Job, packed: Path | None, store: Store, view: View) -> dict[str, Tensor]:
    from optimizer.formats.torch import packed as torch_backend
    from optimizer.models.model import Model

    if packed is not None:
        from safetensors.torch import load_file

        torch_backend.verify(packed)
        file = packed_file(packed)
        assert file is not None
        return dict(load_file(file))
    encoder = codes_of(job.plan, job.source, job.inventory, store, view)
    view.stage("loading the reference")
    reference = Model.load(job.source.folder, job.inventory, full=False)
    return torch_backend.pack(job.plan, reference, view.track, encoder)


def _read_back(
    job: Job, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], draft: Path
) -> list[str]:
    """Who read the draft besides our own reader, or why nobody did; `own`: layer -> what that found.
    Raises PlanError where the engine's code finds another model."""
    from optimizer.formats.safetensors import read_back
    from optimizer.formats.torch import packed

    if job.engine == "vllm":
        settings = untrusted.read(draft / "config.json", "keep")
        return [read_back.by_compressed_tensors(draft, own, settings["quantization_config"])]
    if job.engine not in read_back.NEEDS:
        return []
    why = read_back.lacking(job.engine, job.inventory)
    if why is not None:
        return [why]
    with TemporaryDirectory(dir=draft.parent, prefix="reference-") as folder:
        packed.put(tensors.items(), job.plan, job.inventory, job.source.folder, Path(folder))
        net = packed.load(folder)
        words = net.get_output_embeddings().weight.shape[0]
        wanted = read_back.log_probabilities(net, read_back.window(words))
        del net
    if job.engine == "mlx":
        return [mlx.by_mlx(draft, wanted, job.inventory.dtype == "BF16")]
    halves = job.engine != "transformers" or loading(job.source.folder, job.inventory).halves(
        job.plan
    )
    return [read_back.by_transformers(job.engine, draft, wanted, halves)]


def compare(
    job: Job, tensors: Mapping[str, Tensor], draft: Path, verdict: Verdict
) -> Mapping[str, Tensor]:
    """Every quantized weight in the file against the plan's own; returns what our reader found. Raises
    PlanError."""
    size = (draft / job.format.file).stat().st_size
    if size != verdict.bytes:
        raise PlanError(
            f"The {job.engine} file must have {verdict.bytes} bytes and has {size}. Nothing was kept; "
            "export to=torch, which holds every plan."
        )
    found = job.format.read_back(draft, job.plan, job.subject)
    for layer in job.inventory.layers:
        precision = job.plan.choice[layer.name]
        if precision.kind == "none":
            continue
        parts = {s: tensors[f"{layer.name}.{s}"] for s in precision.parts(layer.rows, layer.cols)}
        off, largest = _farthest(found[layer.name], parts, precision)
        if not off <= job.format.allowed * largest:
            raise PlanError(
                f"Read back, {layer.name} differs from the plan's weights by up to {off:g}. Nothing "
                "was kept; export to=torch, which holds every plan."
            )
    return found


def _farthest(
    read: Tensor, parts: Mapping[str, Tensor], precision: Precision
) -> tuple[float, float]:
    """How far the numbers read [rows, cols] are from a layer's stored tensors (infinity if there are
    none), and the largest of theirs. Some rows at a time: so that a vocabulary isn't held twice."""
    import torch

    from optimizer.quantization.uniform import CACHED, Codes, rows_of

    rows, cols = read.shape
    off, largest = [], []
    for ids in torch.arange(rows).split(max(1, CACHED // cols)):
        own = Codes.unpack(rows_of(parts, precision, ids), precision, cols).decode()
        some = read[ids[0] : ids[-1] + 1]
        there = ~some.isnan().all(1)  # a GGUF leaves out words beyond its vocabulary
        if there.any():
            off.append((some - own)[there].abs().max())
        largest.append(own.abs().max())
    farthest = float(torch.stack(off).max()) if off else float("inf")
    return farthest, float(torch.stack(largest).max())
