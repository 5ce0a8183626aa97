"""Writes trajectories.json: what plain_diloco.py makes of each case, for the real code to follow.

Run it when a case is added: `python tests/golden/make_trajectories.py`. Of each case: the settings, a row for every
inner step (local values of each worker by fragment, θ by fragment as the workers hold it, what was pushed and
applied), all after what is due at that step; and the versions of θ that the server has had, by fragment.
Numbers have nine significant digits.
"""

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

from plain_diloco import INNER_LR, START, TARGETS, PlainDiloco, Settings

PATH = Path(__file__).with_name("trajectories.json")

AVERAGING = {"outer_optimizer": "sgd", "outer_lr": 1.0, "outer_momentum": 0.0}
DELAYED = {"workers": 1, "outer_optimizer": "delayed-nesterov"}

CASES = {
    f"alpha={a} tau={t} P={p}": Settings(mixing_alpha=a, overlap_steps=t, num_fragments=p)
    for a, t, p in product((0.0, 0.5, 1.0), (0, 1, 3), (1, 2, 4))
} | {
    "three workers, H no multiple of P": Settings(
        workers=3, steps=22, sync_every=7, num_fragments=3, overlap_steps=2, mixing_alpha=0.5
    ),
    "fedavg": Settings(workers=3, **AVERAGING),
    "fedavg by tokens": Settings(workers=3, tokens=((2,), (3,), (4, 1)), **AVERAGING),
    "fedavg by tokens, one has far more": Settings(workers=3, tokens=((1,), (2,), (16,)), **AVERAGING),
    "streaming by tokens": Settings(
        num_fragments=2, overlap_steps=3, mixing_alpha=0.5, tokens=((1, 2, 9), (5, 1, 1, 1, 4))
    ),
    "H=1": Settings(workers=3, sync_every=1, **AVERAGING),
    "H=1 with Nesterov": Settings(workers=3, sync_every=1),
    "one worker, averaging": Settings(workers=1, **AVERAGING),
    "one worker": Settings(workers=1),
    "one worker, streaming": Settings(workers=1, num_fragments=2, overlap_steps=1, mixing_alpha=0.5),
    "delayed, equal pushes": Settings(steps=40, sync_every=5, delay_buffer=4, curvature=0.0, **DELAYED),
    "delayed, streaming": Settings(
        steps=32, num_fragments=2, overlap_steps=2, mixing_alpha=0.5, delay_buffer=3, **DELAYED
    ),
}


def rounded(values):
    """Nine significant digits, at any depth."""
    return [rounded(v) for v in values] if isinstance(values, list) else float(f"{values:.9g}")


def trajectory(settings: Settings) -> dict:
    plain, rows = PlainDiloco(settings), []
    for _ in range(settings.steps):
        pushed, applied = plain.advance()
        rows.append([rounded(plain.local), rounded(plain.base), pushed, applied])
    return {"settings": asdict(settings), "rows": rows, "versions": rounded(plain.versions)}


def text() -> str:
    """One line a row: a difference shows where it begins."""
    lines = [
        f'{{"inner_lr": {INNER_LR}, "start": {json.dumps(START)}, "targets": {json.dumps(TARGETS)},',
        '"columns": ["local, by worker and fragment", "theta, by fragment", "pushed", "applied"],',
        '"cases": {',
    ]
    for i, (name, settings) in enumerate(CASES.items()):
        case = trajectory(settings)
        lines += [f'{"," if i else ""}"{name}": {{"settings": {json.dumps(case["settings"])},', '"rows": [']
        lines.append(",\n".join(json.dumps(row, separators=(",", ":")) for row in case["rows"]))
        lines.append(f'], "versions": {json.dumps(case["versions"], separators=(",", ":"))}}}')
    return "\n".join([*lines, "}}\n"])


if __name__ == "__main__":
    PATH.write_text(text())
