"""How the errors of layers, rounded each to each precision, disturb one another, all pairs at once.

At the reference KL ~ 1/2 sum_ab <e_a, F e_b> over the errors e of a plan's (layer, precision)s. With
r = sqrt(p) * xi - p <sqrt(p), xi>, xi = +-1 at random, E r r' = diag(p) - p p' is the Fisher metric of
the logits, so one backward pass of <logits, r> through a window of T tokens gives a sample
    z_a = <G, e_a>,   E z_a z_b = T <e_a, F e_b>
of every pair. What `sensitivity=directional` squares is kept here instead.

measure.py sample TEXT OUT.npz [WINDOWS LENGTH DRAWS]   z [samples, layers, precisions]; bf16
measure.py report TEXT OUT.npz                          correlations, the best plans they promise
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from optimizer.commands import optimize
from optimizer.config import Optimize
from optimizer.data.text import Data, Part
from optimizer.plan import Budget, Palette
from optimizer.quantization.methods import bind
from optimizer.search import Problem, exact
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace, search_space
from optimizer.stages.table import measure_table

TOGETHER = 8  # windows of a backward pass
BUDGETS = (3.0, 3.5, 4.0, 5.0)


def setup(
    text: str, windows: int = 64, length: int = 128
) -> tuple[Optimize, Session, SearchSpace]:
    store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
    data = Data(source="text", path=text, calibration=Part(sequences=windows, length=length))
    config = Optimize(model="smollm2", budget=Budget(code_bits=4), data=data, store=store,
                      palette=Palette(bits=[2, 3, 4, 5, 6, 8]))  # fmt: skip
    session = Session.open("smollm2", data, store)
    return config, session, search_space(config, session.inventory)


def sample(text: str, out: str, windows: int = 256, length: int = 64, draws: int = 8) -> None:
    config, session, space = setup(text, windows, length)
    net, quantizer = session.model.net, bind(config.quantizer, session)
    layers = [session.model.layers[group[0]] for group in space.groups]
    errors, inputs, now, found = {}, {}, {}, []
    for x in layers:
        weight = session.model.weight(x.name)
        rounded = [quantizer.round(weight, space.fitted[x.name, c], x.name) for c in space.columns]
        errors[x.name] = torch.stack([(r - weight).flatten() for r in rounded]).bfloat16().T
    net.bfloat16()
    for x in layers:
        module = net.get_submodule(x.parameter.rpartition(".")[0])

        def keep(_module: Any, args: Any, _output: Any, name: str = x.name) -> None:
            inputs[name] = args[0].detach()

        def project(_module: Any, _inputs: Any, outputs: Any, name: str = x.name) -> None:
            gradient = torch.bmm(outputs[0].transpose(1, 2), inputs[name]).flatten(1)
            now[name] = (gradient @ errors[name]).float()

        module.register_forward_hook(keep)
        module.register_full_backward_hook(project)
    net.get_input_embeddings().register_forward_hook(lambda _m, _i, y: y.requires_grad_(True))
    rng, begun = torch.Generator().manual_seed(0), time.monotonic()
    for i in range(0, windows, TOGETHER):
        ids = torch.from_numpy(session.calibration()[i : i + TOGETHER])
        logits = net(input_ids=ids, use_cache=False).logits[:, :-1]
        p = logits.detach().float().softmax(-1)
        for draw in range(draws):
            signs = torch.randint(0, 2, p.shape, generator=rng, dtype=torch.int8) * 2 - 1
            r = p.sqrt() * signs
            r -= p * r.sum(-1, keepdim=True)
            logits.backward(r.to(logits.dtype), retain_graph=draw < draws - 1)
            found.append(torch.stack([now[x.name] for x in layers], 1).numpy())
        print(f"{i + TOGETHER} of {windows} windows, {time.monotonic() - begun:.0f} s", flush=True)
    np.savez(out, z=np.concatenate(found), tokens=length - 1)


class Quadratic:
    """loss(x) = sum_g D[g, x_g] + share * (sum over pairs of the measured cross terms)."""

    def __init__(self, posed: Problem, correlation: np.ndarray, share: float) -> None:
        self.posed, (self.groups, self.columns) = posed, posed.loss.shape
        root = np.sqrt(np.maximum(posed.loss, 0)).ravel()
        self.cross = share * correlation * np.outer(root, root)
        rows = np.repeat(np.arange(self.groups), self.columns)
        self.same = rows[:, None] == rows[None, :]
        self.cross[self.same] = 0

    def value(self, x: np.ndarray) -> float:
        at = np.arange(self.groups) * self.columns + x
        return self.posed.losses(x) + float(self.cross[np.ix_(at, at)].sum())

    def descend(self, x: np.ndarray) -> np.ndarray:
        """The best exchange of two layers' precisions, again and again, at the budget."""
        x, posed = x.copy(), self.posed
        rows = np.arange(self.groups)
        while True:
            at = rows * self.columns + x
            field = self.cross[:, at].sum(1)
            here = np.repeat(at, self.columns)
            one = (posed.loss - posed.loss[rows, x][:, None]).ravel() + 2 * (field - field[here])
            pair = (
                self.cross
                - self.cross[:, here]
                - self.cross[here]
                + self.cross[np.ix_(here, here)]
            )
            size = (posed.size - posed.size[rows, x][:, None]).ravel()
            total = one[:, None] + one[None, :] + 2 * pair
            over = posed.sizes(x) + size[:, None] + size[None, :] > posed.limit * (1 + 1e-12)
            total[over | self.same] = np.inf
            a, b = divmod(int(total.argmin()), len(one))
            if total[a, b] > -1e-9:
                return x
            x[a // self.columns], x[b // self.columns] = a % self.columns, b % self.columns


def correlations(z: np.ndarray) -> np.ndarray:
    flat = z.reshape(len(z), -1).astype(np.float64)
    gram = flat.T @ flat
    root = np.sqrt(np.diag(gram))
    return gram / np.outer(root, root)


def report(text: str, file: str) -> None:
    config, session, space = setup(text)
    table = measure_table(session, config, space).loss
    with np.load(file) as found:
        z, tokens = found["z"], int(found["tokens"])
    groups, columns = table.shape
    half = len(z) // 2
    one, two, whole = (correlations(part) for part in (z[:half], z[half:], z))
    rows = np.repeat(np.arange(groups), columns)
    apart = rows[:, None] < rows[None, :]
    signal = np.sqrt(max(np.mean(one[apart] * two[apart]), 0))
    noise = np.sqrt(np.mean((one[apart] - two[apart]) ** 2) / 2)
    print(
        f"correlation of two layers' errors: signal {signal:.4f}, noise of {half} samples {noise:.4f}"
    )
    own = np.array(
        [whole.reshape(groups, columns, groups, columns)[g, :, g] for g in range(groups)]
    )
    print(
        "of one layer's errors at two precisions, mean:",
        space.columns,
        own.mean(0).round(2),
        sep="\n",
    )
    joint = (z.astype(np.float64) ** 2).mean(0) / (2 * tokens)
    for i, column in enumerate(space.columns):
        ratio = np.log(joint[:, i] / table[:, i])
        print(
            f"{column}: whole over diagonal Fisher, median {np.exp(np.median(ratio)):.3f}, "
            f"sd of the log {ratio.std():.2f}"
        )
    share = signal / np.sqrt(
        signal**2 + noise**2 / 2
    )  # so that the cross terms have the signal's size
    quantizer = bind(config.quantizer, session)
    for bits in BUDGETS:
        posed = optimize._pose(
            replace(config, budget=Budget(code_bits=bits)), session.inventory, space, table
        )
        start = exact.solve(posed)
        ideal = Quadratic(posed, whole, share)
        found = {"table": start, "whole": exact.solve(replace(posed, loss=joint)),
                 "pairs": Quadratic(posed, whole, share**2).descend(start)}  # fmt: skip
        kl = {
            k: session.score(space.choice(x), "heldout", quantizer).mean_kl
            for k, x in found.items()
        }
        gain = ideal.value(ideal.descend(start)) / ideal.value(start)
        print(f"{bits}: such cross terms allow {gain:.3f} of the table's loss; held-out",
              {k: round(v, 4) for k, v in kl.items()}, flush=True)  # fmt: skip


if __name__ == "__main__":
    kind, text, file, *sizes = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    sample(text, file, *map(int, sizes)) if kind == "sample" else report(text, file)
