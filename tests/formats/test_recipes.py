"""Plans as other tools' input: what the files say of each layer is what the plan says."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from optimizer.cli.main import main
from optimizer.commands import export
from optimizer.errors import PlanError
from optimizer.plan import UNTOUCHED, Plan, Precision
from tests.formats.conftest import G64, Wide, dealt, uniform

NVFP4, MXFP4, FP8, BLOCK = (
    Precision.floating(kind) for kind in ("nvfp4", "mxfp4", "fp8", "fp8_block")
)


def written(plan: Plan, to: str, wide: Wide, out: Path) -> Path:
    verdict = export.export(plan, to, out, str(wide.store))
    assert verdict.bytes is None and not list(out.glob("*.safetensors"))
    assert any("measure" in note for note in verdict.notes)
    assert (out / "manifest.json").is_file() and plan.id in (out / "README.md").read_text()
    return out


def modules(plan: Plan) -> dict[str, Precision]:
    return {name.removesuffix(".weight"): p for name, p in plan.choice.items()}


def test_modelopt_gets_every_layers_algorithm(wide: Wide, tmp_path: Path) -> None:
    plan = wide.plan(dealt(wide.inventory.layers, [NVFP4, FP8, UNTOUCHED, BLOCK]), "modelopt")
    out = written(plan, "modelopt", wide, tmp_path / "out")
    found = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert found["quant_algo"] == "MIXED_PRECISION"
    algorithms = {"nvfp4": "W4A16_NVFP4", "fp8": "FP8", "fp8_block": "FP8_PB_WO"}
    for name, precision in modules(plan).items():
        if precision.kind == "none":
            linear = name != "model.embed_tokens"
            assert name not in found["quantized_layers"]
            assert (name in found["exclude_modules"]) == linear
        else:
            own = found["quantized_layers"][name]
            assert own["quant_algo"] == algorithms[precision.kind]
            assert own.get("group_size") == (16 if precision.kind == "nvfp4" else None)


def quantizers(script: str) -> list[dict[str, Any]]:
    """The `quant_cfg` of a script, without running it."""
    for node in ast.parse(script).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CONFIG":
            return ast.literal_eval(node.value)["quant_cfg"]
    raise AssertionError("no CONFIG")


def test_modelopts_script_turns_on_what_the_plan_rounds(wide: Wide, tmp_path: Path) -> None:
    plan = wide.plan(dealt(wide.inventory.layers, [NVFP4, FP8, UNTOUCHED, BLOCK]), "modelopt")
    out = written(plan, "modelopt", wide, tmp_path / "out")
    entries = quantizers((out / "quantize.py").read_text())
    assert entries[0] == {"quantizer_name": "*", "enable": False}

    def last(name: str) -> dict[str, Any]:
        """Later entries win."""
        return [x for x in entries if fnmatch.fnmatchcase(name, x["quantizer_name"])][-1]

    bits = {"nvfp4": (2, 1), "fp8": (4, 3), "fp8_block": (4, 3)}
    for name, precision in modules(plan).items():
        own = last(f"{name}.weight_quantizer")
        assert own.get("enable", True) == (precision.kind != "none")
        if precision.kind != "none":
            assert own["cfg"]["num_bits"] == bits[precision.kind]
        assert last(f"{name}.input_quantizer").get("enable", True) == (precision.kind == "fp8")
    nvfp4 = next(x for x in entries if x.get("cfg", {}).get("num_bits") == (2, 1))["cfg"]
    assert nvfp4["block_sizes"][-1] == 16 and nvfp4["block_sizes"]["scale_bits"] == (4, 3)


def test_vllm_rounds_each_layer_by_one_scheme(wide: Wide, tmp_path: Path) -> None:
    plan = wide.plan(dealt(wide.inventory.layers, [MXFP4, FP8, UNTOUCHED, BLOCK]), "vllm-online")
    out = written(plan, "vllm-online", wide, tmp_path / "out")
    found = json.loads((out / "online.json").read_text())
    schemes = {"mxfp4": "mxfp4", "fp8": "fp8_per_channel", "fp8_block": "fp8_per_block"}
    for name, precision in modules(plan).items():
        own = [s for t, s in found["targets"].items() if re.match(t.removeprefix("re:"), name)]
        assert own == [schemes[k] for k in [precision.kind] if k != "none"]
        assert (name in found["ignore"]) == (not own and name != "model.embed_tokens")


EXL3 = [Precision("int", bits, 64) for bits in (4, 4, 3, 6)] + [Precision("int", 8, None, True)]


def test_exl3_takes_tensors_of_other_conversions(wide: Wide, tmp_path: Path) -> None:
    plan = wide.plan(dealt(wide.inventory.layers, EXL3), "exl3")
    out = written(plan, "exl3", wide, tmp_path / "out")
    found = yaml.safe_load((out / "overrides.yaml").read_text())
    folders = {source["id"]: source["model_dir"] for source in found["sources"]}
    text = (out / "README.md").read_text()
    assert "recompile.py -i exl3-4bpw -o OUT -or overrides.yaml" in text
    for name, precision in modules(plan).items():
        if precision.kind == "none":
            continue
        tensor = f"{name}.trellis"
        own = [o for o in found["overrides"] if fnmatch.fnmatchcase(tensor, o["key"])]
        folder = folders[own[-1]["source"]] if own else "./exl3-4bpw"  # the later wins
        assert folder == f"./exl3-{precision.bits}bpw"
        assert f"-o exl3-{precision.bits}bpw" in text


def test_one_width_needs_no_overrides(wide: Wide, tmp_path: Path) -> None:
    out = written(wide.plan(uniform(wide, G64), "exl3"), "exl3", wide, tmp_path / "out")
    found = yaml.safe_load((out / "overrides.yaml").read_text())
    assert found == {"sources": [], "overrides": []}


@pytest.mark.parametrize(
    ("to", "precision", "words"),
    [
        ("modelopt", MXFP4, "modelopt executes none, nvfp4, fp8, fp8_block, and not mxfp4"),
        ("vllm-online", NVFP4, "and not nvfp4"),
        ("exl3", FP8, "and not fp8"),
        ("exl3", Precision("int", 7, 64), "and not int7_g64"),
    ],
)
def test_what_a_tool_cannot_make_is_refused(
    wide: Wide, tmp_path: Path, to: str, precision: Precision, words: str
) -> None:
    plan = wide.plan(uniform(wide, precision), "torch")
    with pytest.raises(PlanError, match=words):
        export.export(plan, to, tmp_path / "out", str(wide.store))
    assert not list(tmp_path.iterdir())


def test_joined_layers_must_agree_for_vllm(wide: Wide) -> None:
    for to in ("modelopt", "vllm-online"):
        plan = wide.plan(uniform(wide, FP8, k_proj=UNTOUCHED), "torch")
        assert "one precision" in export.check(plan, to, str(wide.store)).errors[0]
    mixed = wide.plan(uniform(wide, G64, k_proj=Precision("int", 6, 64)), "torch")
    assert not export.check(mixed, "exl3", str(wide.store)).errors


def test_layers_that_exl3_would_round_anyway(wide: Wide) -> None:
    plan = wide.plan(uniform(wide, G64, o_proj=UNTOUCHED), "torch")
    (error,) = export.check(plan, "exl3", str(wide.store)).errors
    assert "every Linear layer" in error and "palette.bits" in error
    assert (
        "quantizes layers"
        in export.check(wide.plan({}, "x"), "modelopt", str(wide.store)).errors[0]
    )


def test_check_says_that_a_recipe_has_no_weights(
    wide: Wide, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = wide.plan(uniform(wide, FP8), "torch").save(tmp_path / "plan.json")
    assert main(["check", str(plan), "to=modelopt", f"store={wide.store}"]) == 0
    assert "modelopt can make this plan's model itself" in capsys.readouterr().out
