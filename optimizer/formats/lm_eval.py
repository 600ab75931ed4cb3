"""Our minimal pairs as tasks of lm-evaluation-harness: YAML beside JSONL, read without a network.

A pair is a multiple-choice question: after `prefix`, `good` or `bad`. A task for each phenomenon and
language, and a group of all of them. Continuations carry their own leading space, so nothing is put
between prefix and choice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from optimizer.data.pairs import Pair, cells

GROUP = "mezzotint_probes"
README = """\
# Minimal pairs for lm-evaluation-harness

    lm_eval --model hf --model_args pretrained=MODEL --tasks {group} --include_path {folder}

A task for each phenomenon and language; `{group}` is all of them. The YAML files name their JSONL by
its place, {folder}: change `data_files` where the folder moves.
"""


def names(pairs: Sequence[Pair]) -> list[str]:
    """All tasks that `write` makes of the pairs: the group first, then one for each cell."""
    return [GROUP, *(f"mezzotint_{'_'.join(cell)}" for cell in sorted(cells(pairs)))]


def write(pairs: Sequence[Pair], draft: Path, place: Path) -> None:
    """Fill `draft`, which will stand at `place`."""
    group, *tasks = names(pairs)
    for task, cell in zip(tasks, sorted(cells(pairs)), strict=True):
        file, own = "_".join(cell), [pair for pair in pairs if pair.cell == cell]
        lines = [json.dumps(asdict(pair), ensure_ascii=False) for pair in own]
        (draft / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _save(draft / f"{task}.yaml", _task(task, place.absolute() / f"{file}.jsonl"))
    parts = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    _save(draft / f"{group}.yaml", {"group": group, "task": tasks, **parts})
    readme = README.format(group=group, folder=place.absolute())
    (draft / "README.md").write_text(readme, encoding="utf-8")


def _task(name: str, file: Path) -> dict[str, object]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prefix}}",
        "doc_to_choice": "{{[good, bad]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }


def _save(path: Path, value: object) -> None:
    """JSON is YAML, and quotes everything that a name or a path may hold."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
