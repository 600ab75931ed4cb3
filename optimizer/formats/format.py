"""What writes a plan's model for an engine: one class an engine, chosen by its name.

Others register a format of their own as an entry point of the group `mezzotint.formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from optimizer.errors import ConfigError
from optimizer.extensions import extensions
from optimizer.formats import rules
from optimizer.formats.rules import Demands, Verdict
from optimizer.formats.runtime import Runtime
from optimizer.formats.safetensors.checkpoint import head_alone
from optimizer.formats.safetensors.joined import joined
from optimizer.models.source import PACKED_FILE
from optimizer.plan import Inventory, Layer, Plan, Precision

if TYPE_CHECKING:
    from torch import Tensor

    from optimizer.models.source import Source
    from optimizer.store import Store

ENTRY_POINTS = "mezzotint.formats"


@dataclass(frozen=True)
class Subject:
    """The model that plans are made for. folder: where the reference lies; base: see `Format.base`;
    activations: whether the engine rounds the inputs of floats' layers as it runs, where it can."""

    inventory: Inventory
    folder: Path
    base: Any = None
    activations: bool = False


class Format:
    """Derive from it, give it a `name`, and write `runtime` (for an engine that has no file in
    conf/runtime), `holds`, `checker`, `write` and `read_back`.

    file: the weights' file in a written folder. run: how a person starts the engine on it.
    allowed: how far a weight that is read back may be from the plan's, as a share of the layer's
    largest. larger: whether its files can be larger than ours, so that a budget of bytes must ask.
    """

    name: ClassVar[str] = ""
    file: ClassVar[str] = "model.safetensors"
    run: ClassVar[str] = ""
    allowed: ClassVar[float] = 0.0
    larger: ClassVar[bool] = True

    def runtime(self) -> Runtime:
        """What the engine executes and joins."""
        return Runtime(name=self.name)

    def holds(self, layer: Layer, precision: Precision) -> str | None:  # noqa: ARG002
        """None, or why the format can't hold the layer in that precision, which is never `none`."""
        return None

    def demands(self, runtime: Runtime, subject: Subject) -> Demands:
        """What the engine asks of the plans for one model."""
        together = joined(runtime, subject.folder)
        return Demands(runtime, together.groups, self.holds, notes=together.notes)

    def base(self, source: Source, inventory: Inventory, store: Store, given: str | None) -> Any:
        """What the file is made from, where the plan and the checkpoint aren't enough. given: a file
        of the user's. Raises ModelError where the format can't hold this model."""
        del source, inventory, store
        if given is not None:
            raise ConfigError(
                f"gguf= is for runtime=llamacpp and to=gguf, not for {self.name}. Leave it out."
            )

    def checker(self, runtime: Runtime, subject: Subject) -> Callable[[Plan], Verdict]:
        """Plan -> whether the engine would load and run it, and the exact bytes of its file."""
        raise NotImplementedError(f"{type(self).__name__} has no checker.")

    def write(self, plan: Plan, subject: Subject, packed: Mapping[str, Tensor], out: Path) -> None:
        """packed: the plan's stored tensors, named LAYER.PART. out: an empty folder."""
        raise NotImplementedError(f"{type(self).__name__} has no write.")

    def read_back(self, out: Path, plan: Plan, subject: Subject) -> Mapping[str, Tensor]:
        """What the written files say by themselves: layer -> W' [rows, cols], fp32. Of quantized
        layers at least. Raises PlanError."""
        raise NotImplementedError(f"{type(self).__name__} has no read_back.")


class Torch(Format):
    """Our own folder, which `optimizer.load` reads. It holds every precision."""

    name = "torch"
    file = PACKED_FILE
    run = "optimizer.load(THIS_FOLDER)  # Python, pip install mezzotint; a transformers model"
    larger = False

    def checker(self, runtime: Runtime, subject: Subject) -> Callable[[Plan], Verdict]:
        del subject
        return lambda plan: rules.packed(plan, runtime)

    def write(self, plan: Plan, subject: Subject, packed: Mapping[str, Tensor], out: Path) -> None:
        """The whole folder, with its manifest."""
        from optimizer.formats.torch.packed import put

        put(packed.items(), plan, subject.inventory, subject.folder, out)

    def read_back(self, out: Path, plan: Plan, subject: Subject) -> Mapping[str, Tensor]:
        from optimizer.formats.torch.reader import tensors
        from optimizer.quantization.uniform import Codes

        found = {}
        with tensors(out / self.file) as stored:
            for layer in subject.inventory.layers:
                precision = plan.choice[layer.name]
                names = precision.parts(layer.rows, layer.cols)
                if names:
                    parts = {name: stored.get(f"{layer.name}.{name}") for name in names}
                    found[layer.name] = Codes.unpack(parts, precision, layer.cols).decode()
        return found


class Checkpoint(Format):
    """A format of safetensors, written by one module."""

    def module(self) -> Any:
        raise NotImplementedError

    def demands(self, runtime: Runtime, subject: Subject) -> Demands:
        head_alone(subject.inventory, self.name)
        return super().demands(runtime, subject)

    def checker(self, runtime: Runtime, subject: Subject) -> Callable[[Plan], Verdict]:
        demands, module = self.demands(runtime, subject), self.module()
        return lambda plan: module.check(plan, subject.inventory, demands)

    def write(self, plan: Plan, subject: Subject, packed: Mapping[str, Tensor], out: Path) -> None:
        self.module().write(plan, subject.inventory, packed, subject.folder, out)

    def read_back(self, out: Path, plan: Plan, subject: Subject) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = self.module().decode(out, plan, subject.inventory)
        return found


class Vllm(Checkpoint):
    """compressed-tensors, as vLLM loads them."""

    name = "vllm"
    run = "vllm serve THIS_FOLDER"

    def module(self) -> Any:
        from optimizer.formats.safetensors import compressed_tensors

        return compressed_tensors

    def holds(self, layer: Layer, precision: Precision) -> str | None:
        from optimizer.formats.safetensors import floating

        return floating.holds(layer, precision)

    def checker(self, runtime: Runtime, subject: Subject) -> Callable[[Plan], Verdict]:
        from optimizer.formats.safetensors import floating

        check = super().checker(runtime, subject)
        return (lambda p: floating.multiplied(p, check(p))) if subject.activations else check

    def write(self, plan: Plan, subject: Subject, packed: Mapping[str, Tensor], out: Path) -> None:
        own = (plan, subject.inventory, packed, subject.folder, out)
        told = {"activations": True} if subject.activations else {}
        self.module().write(*own, **told)


class Transformers(Vllm):
    """compressed-tensors, as transformers loads them, which depends on the model's class."""

    name = "transformers"
    run = "AutoModelForCausalLM.from_pretrained(THIS_FOLDER)  # pip install compressed-tensors"

    def demands(self, runtime: Runtime, subject: Subject) -> Demands:
        from optimizer.formats.safetensors.loader import loading

        found = loading(subject.folder, subject.inventory)
        own: Demands = self.module().demands(runtime, subject.inventory, found)
        return own

    def checker(self, runtime: Runtime, subject: Subject) -> Callable[[Plan], Verdict]:
        from optimizer.formats.safetensors.loader import loading

        found, module = loading(subject.folder, subject.inventory), self.module()
        demands = module.demands(runtime, subject.inventory, found)
        return lambda plan: module.check(plan, subject.inventory, demands, found)

    def write(self, plan: Plan, subject: Subject, packed: Mapping[str, Tensor], out: Path) -> None:
        from optimizer.formats.safetensors.loader import loading

        found = loading(subject.folder, subject.inventory)
        self.module().write(plan, subject.inventory, packed, subject.folder, out, found)

    def read_back(self, out: Path, plan: Plan, subject: Subject) -> Mapping[str, Tensor]:
        from optimizer.formats.safetensors.loader import loading

        loader = loading(subject.folder, subject.inventory)
        found: dict[str, Tensor] = self.module().decode(out, plan, subject.inventory, loader)
        return found


class Gptq(Checkpoint):
    """GPTQ's format, for GPTQModel and vLLM."""

    name = "gptq"
    run = "GPTQModel.load(THIS_FOLDER)  # pip install gptqmodel; or vllm serve THIS_FOLDER"

    def module(self) -> Any:
        from optimizer.formats.safetensors import gptq

        return gptq

    def holds(self, layer: Layer, precision: Precision) -> str | None:
        from optimizer.formats.safetensors import gptq

        return gptq.shaped(layer, precision)


class AutoRound(Gptq):
    """AutoRound's format, whose tensors are GPTQ's."""

    name = "autoround"
    run = "AutoModelForCausalLM.from_pretrained(THIS_FOLDER)  # pip install auto-round"

    def module(self) -> Any:
        from optimizer.formats.safetensors import autoround

        return autoround

    def demands(self, runtime: Runtime, subject: Subject) -> Demands:
        from optimizer.formats.safetensors.loader import loading

        holds = self.module().holds(loading(subject.folder, subject.inventory))
        return replace(super().demands(runtime, subject), holds=holds)


class Mlx(Checkpoint):
    """mlx-lm's format."""

    name = "mlx"
    run = "mlx_lm.generate --model THIS_FOLDER --prompt TEXT  # pip install mlx-lm"
    allowed = 2.0**-7  # scales and biases in the model's own 16 bits

    def module(self) -> Any:
        from optimizer.formats import mlx

        return mlx

    def holds(self, layer: Layer, precision: Precision) -> str | None:
        from optimizer.formats import mlx

        return mlx.holds(layer, precision)


class Recipe(Format):
    """A plan as another tool's input: files without weights, written by the module of its name."""

    larger = False

    def module(self) -> Any:
        return import_module(f"optimizer.formats.{self.name.replace('-', '_')}")

    def runtime(self) -> Runtime:
        own = self.module()
        return Runtime(name=self.name, executes=own.EXECUTES, experts=own.EXPERTS)

    def holds(self, layer: Layer, precision: Precision) -> str | None:
        found: str | None = self.module().holds(layer, precision)
        return found

    def refused(self, plan: Plan, inventory: Inventory) -> list[str]:
        """What speaks against a plan as a whole."""
        del plan, inventory
        return []

    def checker(self, runtime: Runtime, subject: Subject) -> Callable[[Plan], Verdict]:
        demands, module = self.demands(runtime, subject), self.module()

        def check(plan: Plan) -> Verdict:
            errors = demands.errors(plan, subject.inventory)
            errors += self.refused(plan, subject.inventory)
            if not rules.quantized(plan, subject.inventory):
                errors.append(f"A recipe for {self.name} quantizes layers; this plan has none.")
            notes = (*demands.notes, *module.NOTES)
            return Verdict(self.name, tuple(errors), () if errors else notes)

        return check

    def write(self, plan: Plan, subject: Subject, packed: Mapping[str, Tensor], out: Path) -> None:
        del packed
        self.module().write(plan, subject.inventory, out)


class ModelOpt(Recipe):
    """NVIDIA ModelOpt's quantize.py and hf_quant_config.json."""

    name = "modelopt"


class VllmOnline(Recipe):
    """vLLM's --quantization-config."""

    name = "vllm-online"


class Exl3(Recipe):
    """exllamav3's overrides for util/recompile.py."""

    name = "exl3"

    def refused(self, plan: Plan, inventory: Inventory) -> list[str]:
        found: list[str] = self.module().refused(plan, inventory)
        return found


class LlamaCpp(Format):
    """A GGUF file."""

    name = "llamacpp"
    file = "model.gguf"
    run = "llama-server --model THIS_FOLDER/model.gguf"
    allowed = 2.0**-11  # an fp16 minimum instead of an integer zero point

    def holds(self, layer: Layer, precision: Precision) -> str | None:
        from optimizer.formats.gguf import writer

        return writer.holds(layer, precision)

    def base(self, source: Source, inventory: Inventory, store: Store, given: str | None) -> Any:
        from optimizer.formats.gguf import base

        return base.find(source, inventory, store, given)

    def demands(self, runtime: Runtime, subject: Subject) -> Demands:
        from optimizer.formats.gguf import writer

        if subject.base is None:
            return super().demands(runtime, subject)
        return writer.demands(runtime, subject.base)

    def checker(self, runtime: Runtime, subject: Subject) -> Callable[[Plan], Verdict]:
        from optimizer.formats.gguf import writer

        if subject.base is None:
            raise ConfigError("A GGUF is made from a base file; see `Format.base`.")
        return lambda plan: writer.check(plan, subject.inventory, runtime, subject.base)

    def write(self, plan: Plan, subject: Subject, packed: Mapping[str, Tensor], out: Path) -> None:
        from optimizer.formats.gguf import writer

        writer.write(plan, subject.inventory, packed, subject.base, out)

    def read_back(self, out: Path, plan: Plan, subject: Subject) -> Mapping[str, Tensor]:
        from optimizer.formats.gguf import writer

        return writer.decode(out, plan, subject.inventory, subject.base)


BUILT_IN: dict[str, type[Format]] = {
    made.name: made
    for made in (
        Torch,
        Vllm,
        Transformers,
        AutoRound,
        Gptq,
        Mlx,
        LlamaCpp,
        ModelOpt,
        VllmOnline,
        Exl3,
    )
}


def formats() -> dict[str, type[Format]]:
    """Engine -> format: the project's own and those that other packages registered."""
    return BUILT_IN | extensions(ENTRY_POINTS, Format)


def format_of(engine: str) -> Format:
    """Raises ConfigError for an engine that nobody registered."""
    known = BUILT_IN if engine in BUILT_IN else formats()
    if engine not in known:
        raise ConfigError(f"runtime.name is one of {', '.join(known)}, not {engine!r}.")
    return known[engine]()
