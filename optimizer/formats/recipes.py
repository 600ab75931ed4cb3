"""Plans for those who quantize elsewhere: the same allocation as another tool's input file."""

from __future__ import annotations

import re
from pathlib import Path

from optimizer.formats.gguf import writer
from optimizer.formats.gguf.base import Base
from optimizer.formats.safetensors import compressed_tensors
from optimizer.plan import Inventory, Plan


def llama_quantize(plan: Plan, inventory: Inventory, base: Base, out: Path) -> None:
    """tensor_types.txt and how to use it. llama-quantize takes the first expression that is found
    in a name, so each is anchored; rounding and its quality are llama.cpp's."""
    (out / writer.TYPES_FILE).write_text(
        writer.types_file(plan, inventory, base), encoding="utf-8"
    )
    kinds = writer.types_file(plan, inventory, base).splitlines()
    embedding = next(line.split("=")[1] for line in kinds if "token_embd" in line)
    text = f"""# Recipe for llama-quantize, plan {plan.id}

```
llama-quantize --imatrix IMATRIX --tensor-type-file {writer.TYPES_FILE} \\
  --token-embedding-type {embedding} REFERENCE.gguf OUT.gguf Q4_K_M
```

Q4_K_M only names what is not listed. `--dry-run` prints the size without writing. An importance
matrix (llama-imatrix) lowers the loss; Mezzotint's promise is about its own rounding, so measure the
result.
"""
    (out / "README.md").write_text(text, encoding="utf-8")


def llm_compressor(plan: Plan, inventory: Inventory, out: Path) -> None:
    """recipe.yaml for llmcompressor.oneshot with a GPTQModifier that has the plan's schemes."""
    config = compressed_tensors.config(plan, inventory)
    lines = ["quant_stage:", "  quant_modifiers:", "    GPTQModifier:", "      ignore:"]
    lines += [f"        - {name}" for name in config["ignore"]]
    lines.append("      config_groups:")
    for name, group in config["config_groups"].items():
        lines += [f"        {name}:", "          targets:"]
        lines += [f"            - 're:^{re.escape(target)}$'" for target in group["targets"]]
        lines.append("          weights:")
        for key, value in group["weights"].items():
            word = {True: "true", False: "false", None: "null"}.get(value, str(value))
            lines.append(f"            {key}: {word}")
    (out / "recipe.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = f"""# Recipe for llm-compressor, plan {plan.id}

```python
from llmcompressor import oneshot
oneshot(model=MODEL, dataset=DATA, recipe="recipe.yaml", output_dir="OUT")
```

Rounding and its quality are llm-compressor's; Mezzotint's promise is about its own rounding, so
measure the result.
"""
    (out / "README.md").write_text(text, encoding="utf-8")
