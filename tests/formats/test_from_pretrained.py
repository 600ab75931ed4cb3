"""transformers' own from_pretrained reads packed folders, whichever of both is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import optimizer
from optimizer.errors import ConfigError, PlanError

IDS = torch.arange(5, 25)[None]
READ = """
{imports}
import torch
net = AutoModelForCausalLM.from_pretrained({folder!r})
own = optimizer.load({folder!r})
ids = torch.arange(5, 25)[None]
with torch.no_grad():
    assert torch.equal(net(input_ids=ids).logits, own(input_ids=ids).logits)
assert net.config.quantization_config.quant_method == "mezzotint"
said = net.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
assert said.shape[1] == 24
"""
ORDERS = (
    "import optimizer\nfrom transformers import AutoModelForCausalLM",
    "from transformers import AutoModelForCausalLM\nimport optimizer",
)


@pytest.mark.parametrize("imports", [ORDERS[0], pytest.param(ORDERS[1], marks=pytest.mark.slow)])
def test_it_is_what_load_gives(packed_folder: Path, imports: str) -> None:
    code = READ.format(imports=imports, folder=str(packed_folder))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not initialized" not in done.stderr and "not used" not in done.stderr


def test_a_refinement_is_used(nested_folder: Path) -> None:
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(nested_folder)(input_ids=IDS).logits
        own = optimizer.load(nested_folder)(input_ids=IDS).logits
    assert torch.equal(found, own)


def test_a_changed_file_is_refused(packed_folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(packed_folder, tmp_path / "copy")
    (copy / "plan.json").write_text((copy / "plan.json").read_text() + " ")
    with pytest.raises(PlanError, match="was changed"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_one_device(packed_folder: Path) -> None:
    assert AutoModel.from_pretrained(packed_folder, device_map="cpu") is not None
    with pytest.raises(ConfigError, match="on one device"):
        AutoModelForCausalLM.from_pretrained(packed_folder, device_map="auto")


def test_importing_it_imports_no_transformers() -> None:
    code = "import optimizer, sys; assert not {'transformers', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
