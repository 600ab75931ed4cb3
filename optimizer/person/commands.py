"""`mezzotint judge`, `overlay` and `learn`, without Hydra and printing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.data import pairs as probes
from optimizer.data.documents import read_text
from optimizer.errors import ConfigError, TextError
from optimizer.person import entrants, prompts, writing
from optimizer.person.judging import Judging, compare
from optimizer.person.settings import Judge, Learn, Overlay
from optimizer.person.votes import VoteFile, joined, standing
from optimizer.stages.session import check_device
from optimizer.stages.view import View
from optimizer.store import Store, root, write_atomically

if TYPE_CHECKING:
    from optimizer.person.learning import Learned
    from optimizer.person.reveal import Result


@dataclass(frozen=True)
class Ready:
    """A comparison that can be shown. notes: what the person should know before."""

    judging: Judging
    notes: list[str]


def prepare(config: Judge, view: View) -> Ready:
    """Everything that can be wrong, then the texts: from the store, or written now."""
    config.check()
    check_device(config.device)
    file = VoteFile(Path(config.votes))
    file.refresh()
    store = Store(root(config.store), view.note)
    found = entrants.find(config.entrants, config.model, store, "judge")
    reference = entrants.reference(found)
    texts = prompts.gather(config.prompts, config.domains, config.phenomena)
    itself = len({one.identity for one in found}) < len(found)
    twins = config.pool if itself else 2 * round(config.catch * config.questions)
    asked = writing.Asked(config.tokens, config.chat, config.device, twins)
    material = writing.write(found, reference, texts, config.pool, asked, store, view)
    comparison = compare(found, material, config.questions, config.catch, config.judge)
    ready = Judging(comparison, file, config.judge, config.stop)
    ready.begin()
    notes = [*entrants.differences(found), *_skipped(material.skipped), *file.complaints]
    return Ready(ready, notes)


def _skipped(skipped: dict[str, int]) -> list[str]:
    return [f"{count} prompts were left out: {reason}." for reason, count in skipped.items()]


def judge(config: Judge, view: View, ended: Callable[[Result], None]) -> Ready:
    """Prepare and serve until interrupted. ended: is told the result when the names are revealed."""
    from optimizer.person import judge_page, web

    ready = prepare(config, view)
    for note in ready.notes:
        view.note(note)
    sock = web.bind(config.port, view.note)
    port, token = sock.getsockname()[1], web.new_token()
    application = judge_page.application(ready.judging, token, port, ended)
    answered = len(ready.judging.votes)
    most = len(ready.judging.comparison.questions)
    view.note(
        f"{most} questions at most, {answered} answered before. Answers are kept in {config.votes}; "
        "Ctrl-C stops, and the same command goes on."
    )
    web.show(f"http://{web.HOST}:{port}/{token}/", config.open, view.note)
    web.serve(application, sock)
    if ready.judging.over:
        from optimizer.person import record, reveal

        votes = list(ready.judging.votes.values())
        found = reveal.reveal(ready.judging)
        for line in record.comparison(found, votes, Path(config.votes), config.wandb):
            view.note(line)
    else:
        count = len(ready.judging.votes)
        view.note(
            f"{count} answers are in {config.votes}; the same command goes on with the next."
        )
    return ready


# ---------------------------------------------------------------- overlay


def overlay(config: Overlay, view: View) -> None:
    """Serve until interrupted."""
    from optimizer.person import overlay as writing_with
    from optimizer.person import overlay_page, web

    config.check()
    check_device(config.device)
    file = writing_with.ChoiceFile(Path(config.choices))
    begun = "" if config.text is None else read_text(Path(config.text)).rstrip()
    store = Store(root(config.store), view.note)
    found = entrants.find([config.model], config.reference, store, "overlay")
    share = writing_with.share_of(found[0], config.share)
    made = entrants.reference(found)
    writer, other = (
        writing_with.Writer(one, share, store, config.device, view) for one in (found[0], made)
    )
    view.note(f"It stops where {writer.stops}.")
    sock = web.bind(config.port, view.note)
    port, token = sock.getsockname()[1], web.new_token()
    state = overlay_page.State(begun)
    page = overlay_page.OverlayPage(config, writer, other, file, f"/{token}/", state)
    view.note(f"Choices are kept in {config.choices}; Ctrl-C stops.")
    web.show(f"http://{web.HOST}:{port}/{token}/", config.open, view.note)
    try:
        web.serve(overlay_page.application(page, token, port), sock)
    finally:
        writer.close()
        other.close()


# ---------------------------------------------------------------- learn


def learn(config: Learn, view: View) -> Learned:
    """Votes and choices -> the objective, written to `out`."""
    from optimizer.person import learning, meaning_file, record

    config.check()
    out = Path(config.out)
    if out.exists() and not config.overwrite:
        raise ConfigError(
            f"{out} is there already. Choose another out=FILE, or say overwrite=true to replace it."
        )
    votes, choices = [], []
    for name in config.inputs:
        if holds_choices(Path(name)):
            choices.append(name)
        else:
            votes.append(_read(Path(name), view))
    if len(choices) > 1:
        raise ConfigError(
            f"Choices come from one file; {' and '.join(choices)} are two. Put them into one: lines "
            "of choices can simply be joined."
        )
    pairs = (choices[0], len(probes.read(Path(choices[0])))) if choices else None
    settings = learning.Settings(pairs, config.strength, config.texts, config.seed)
    given = standing(joined(votes))
    found = learning.learn(given, settings)
    sources = ", ".join(Path(name).name for name in config.inputs)
    write_atomically(out, meaning_file.text(found, sources, out.absolute().parent).encode())

    files = [*(Path(name) for name in config.inputs), out]
    for line in record.learned(found, given, files, config.wandb):
        view.note(line)
    view.note(f"Wrote {out}. Use it: mezzotint optimize model=... meaning={out}")
    return found


def _read(path: Path, view: View) -> VoteFile:
    if not path.is_file():
        raise TextError(f"There is no file of votes or choices at {path}. Correct its name.")
    file = VoteFile(path)
    file.refresh()
    file.rest()
    for complaint in file.complaints:
        view.note(complaint)
    return file


def holds_choices(path: Path) -> bool:
    """Whether a file's first line is a minimal pair; a file of votes has another kind of lines."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and set(probes.NEEDED) <= row.keys()
