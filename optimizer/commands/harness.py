"""lm-evaluation-harness on the reference and on the packed model, question by question, and what the
two refuse. The harness is an extra: pip install 'mezzotint[harness]'.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.data import pairs, refusals
from optimizer.errors import ConfigError, ModelError
from optimizer.formats import lm_eval as tasks_of
from optimizer.models.source import quiet

ANSWER = 40  # tokens of an answer, enough to tell a refusal
TOGETHER = 10  # prompts that are answered together

Track = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class Paired:
    """One task or kind of prompt, the same questions asked of both models.

    reference, packed: shares that are right (or refused). lost, won: questions that only the
    reference, only the packed model got right. p: McNemar's exact test of lost against won.
    """

    name: str
    count: int
    reference: float
    packed: float
    lost: int
    won: int
    p: float


def paired(name: str, reference: np.ndarray, packed: np.ndarray) -> Paired:
    """reference, packed: bool [questions]."""
    from scipy.stats import binomtest

    lost, won = int((reference & ~packed).sum()), int((~reference & packed).sum())
    p = 1.0 if lost + won == 0 else float(binomtest(lost, lost + won).pvalue)
    shares = float(reference.mean()), float(packed.mean())
    return Paired(name, len(reference), *shares, lost, won, p)


# ---------------------------------------------------------------- the harness


def check(names: Sequence[str]) -> None:
    """Raises ConfigError if the harness isn't installed or knows no such task."""
    if not names:
        return
    known = {*_manager(None).all_tasks, *tasks_of.names(pairs.built_in())}
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3)
            hint = f" Near names: {', '.join(near)}." if near else ""
            raise ConfigError(
                f"lm-evaluation-harness has no task {name!r}.{hint} Our own pairs are "
                f"{tasks_of.GROUP} and its parts, such as {tasks_of.names(pairs.built_in())[1]}."
            )


def _manager(folder: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            "tasks= needs lm-evaluation-harness, which isn't installed. Run: pip install "
            "'mezzotint[harness]'"
        ) from None
    return TaskManager(include_path=None if folder is None else str(folder))


def compare(
    nets: Mapping[str, Any],
    tokenizer: Any,
    names: Sequence[str],
    limit: int | None,
    track: Track = lambda items, _text: items,
) -> list[Paired]:
    """nets: `reference` and `packed`. limit: questions of a task at most. Raises ConfigError for a
    task whose answers aren't right or wrong, one by one."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tasks_of.write(pairs.built_in(), folder, folder)
        manager = _manager(folder)
        found = {
            who: _answers(nets[who], tokenizer, names, limit, manager)
            for who in track([*nets], f"both answer {', '.join(names)}")
        }
    rows = []
    for name, own in found["reference"].items():
        other = found["packed"][name]
        shared = sorted(own.keys() & other.keys())
        both = [np.array([side[i] for i in shared], dtype=bool) for side in (own, other)]
        rows.append(paired(name, *both))
    return rows


@contextmanager
def silenced() -> Iterator[None]:
    """The harness's bars, and its loggers, which write to stderr, would break into our lines. Its
    failures are exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet(), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def _answers(
    net: Any, tokenizer: Any, names: Sequence[str], limit: int | None, manager: Any
) -> dict[str, dict[int, bool]]:
    """Task -> question -> whether it was answered rightly."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with silenced():
        model = HFLM(pretrained=net, tokenizer=tokenizer, batch_size=8)
        done = lm_eval.simple_evaluate(
            model=model,
            tasks=list(names),
            limit=limit,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    found: dict[str, dict[int, bool]] = {}
    for task, samples in done["samples"].items():
        measure = next((m for m in ("acc", "exact_match") if samples and m in samples[0]), None)
        if measure is None:
            raise ConfigError(
                f"The task {task} doesn't say of each answer whether it is right (acc or "
                "exact_match), so the models can't be compared question by question. Choose another."
            )
        found[task] = {int(s["doc_id"]): bool(s[measure]) for s in samples}
    return found


# ---------------------------------------------------------------- refusals


def check_template(tokenizer: Any, model: str) -> None:
    """Raises ModelError where the model has no chat template, or one that fails."""
    try:
        _asked(tokenizer, "Hello")
    except Exception as error:  # noqa: BLE001  (a template is a program of the model's own)
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"refusals=true asks through the model's chat template, and that of {model} gives no "
            f"prompt ({reason[0] if reason else type(error).__name__}). Leave refusals out."
        ) from None


def _asked(tokenizer: Any, text: str) -> list[int]:
    turn = [{"role": "user", "content": text}]
    found = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(found, add_special_tokens=False)["input_ids"])


def refusals_of(net: Any, tokenizer: Any, track: Track) -> dict[str, bool]:
    """Prompt -> whether the model's greedy answer refuses."""
    import torch

    asked, found = refusals.prompts(), {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    device = next(net.parameters()).device
    for first in track(range(0, len(asked), TOGETHER), "prompts that may be refused"):
        some = asked[first : first + TOGETHER]
        rows = [_asked(tokenizer, prompt.text) for prompt in some]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device
        )
        with torch.inference_mode():
            said = net.generate(
                ids, attention_mask=mask, max_new_tokens=ANSWER, do_sample=False, pad_token_id=pad
            )
        for prompt, row in zip(some, said[:, width:].tolist(), strict=True):
            answer = tokenizer.decode(row, skip_special_tokens=True)
            found[prompt.id] = refusals.refused(answer)
    return found


def compare_refusals(nets: Mapping[str, Any], tokenizer: Any, track: Track) -> list[Paired]:
    """Harmless and harmful prompts: shares that each model refuses, and the flips."""
    said = {who: refusals_of(net, tokenizer, track) for who, net in nets.items()}
    rows = []
    for kind in refusals.KINDS:
        own = [prompt.id for prompt in refusals.prompts() if prompt.kind == kind]
        both = [np.array([said[who][i] for i in own]) for who in ("reference", "packed")]
        rows.append(paired(kind, *both))
    return rows
