"""Makes the logs beside it: what other trainers write, of made-up runs whose truth is known.

    python tests/data/logs/hand/make.py

A run has 256 pairs; ln pi of chosen and rejected changes by `chosen` and `rejected` nats on average, in the shape of
`course`, by another amount for every pair. Formats after the trainers' own code: LLaMA-Factory (train/dpo/trainer.py,
train/callbacks.py), OpenRLHF (trainer/dpo_trainer.py), axolotl (transformers' printed dictionaries between progress
bars), ms-swift (logging.jsonl, args.json), wandb (history and chart as CSV), TRL's CPOTrainer for SimPO.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
PAIRS, BATCH, LENGTH = 256, 16, 80
Course = Callable[[float], float]


def line(x: float) -> float:
    return x


def dip(x: float) -> float:
    return float(np.sin(np.pi * min(1.0, 1.25 * x)))  # back at its start for the last fifth


def run(seed: int, chosen: float, rejected: float, beta: float, entries: int = 60, course: Course = line, free: bool = False,
        per_token: bool = False, evaluate: int = 0, spread: float = 0.3, alike: bool = False) -> Iterator[dict[str, float]]:  # fmt: skip
    """Entries with TRL's keys. free: rewards without a reference. evaluate: every so many entries, on the same pairs.

    alike: both responses of a pair move together.
    """
    rng = np.random.default_rng(seed)
    own = rng.standard_t(4, size=(2, PAIRS)) * spread
    if alike:
        own[1] = own[0]
    own -= own.mean(1, keepdims=True)
    reference = -rng.gamma(20.0, 6.0, size=(2, PAIRS))
    for i in range(1, entries + 1):
        x = i / entries
        shift = np.array([[chosen * course(x)], [rejected * x]])
        logp = reference + shift + own * (abs(chosen) + abs(rejected)) * x
        for prefix, who in (("", rng.choice(PAIRS, BATCH, replace=False)), ("eval_", np.arange(PAIRS))):
            if prefix and not (evaluate and i % evaluate == 0):
                continue
            y, y_ref = logp[:, who] / (LENGTH if per_token else 1), reference[:, who] / (LENGTH if per_token else 1)
            reward = beta * (y if free else y - y_ref)
            u = reward[0] - reward[1]
            yield {
                "step": 10 * i,
                "epoch": round(3 * x, 2),
                f"{prefix}loss": float(np.log1p(np.exp(-u)).mean()),
                f"{prefix}rewards/chosen": float(reward[0].mean()),
                f"{prefix}rewards/rejected": float(reward[1].mean()),
                f"{prefix}rewards/margins": float(u.mean()),
                f"{prefix}rewards/accuracies": float((u > 0).mean()),
                f"{prefix}logps/chosen": float(y[0].mean()),
                f"{prefix}logps/rejected": float(y[1].mean()),
            }


def save(name: str, text: str) -> None:
    (HERE / name).parent.mkdir(exist_ok=True)
    (HERE / name).write_text(text, encoding="utf-8")


def json_lines(entries: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(e) + "\n" for e in entries)


def table(columns: list[str], rows: list[dict[str, Any]]) -> str:
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def main() -> None:
    # LLaMA-Factory: its own log has no rewards, the state of transformers beside it has. Displaced.
    entries = list(run(1, -12.0, -40.0, 0.1, evaluate=10))
    state = {"global_step": 600, "max_steps": 600, "log_history": entries}
    own = [
        {"current_steps": e["step"], "total_steps": 600, "loss": e["loss"], "accuracy": e["rewards/accuracies"], "lr": 5e-6}
        for e in entries if "loss" in e
    ]  # fmt: skip
    save("llamafactory_displaced/trainer_state.json", json.dumps(state))
    save("llamafactory_displaced/trainer_log.jsonl", json_lines(own))

    # OpenRLHF by wandb: train/..., no log-probabilities, no evaluation of rewards. Displaced.
    names = {
        "loss": "loss",
        "rewards/accuracies": "acc",
        "rewards/chosen": "chosen_reward",
        "rewards/rejected": "reject_reward",
    }
    rlhf = [
        {f"train/{new}": e[old] for old, new in names.items()} | {"train/global_step": e["step"], "train/lr": 5e-7}
        for e in run(2, -30.0, -60.0, 0.1)
    ]
    save("openrlhf_displaced.jsonl", json_lines(rlhf))

    # axolotl, captured: dictionaries printed between progress bars; no steps. Kept.
    text = "[2026-01-05 10:00:00,000] [INFO] Starting trainer...\n  0%|          | 0/600 [00:00<?, ?it/s]\n"
    for e in run(3, 4.0, -20.0, 0.1):
        printed = {k: v for k, v in e.items() if k != "step"} | {"grad_norm": 1.5, "learning_rate": 5e-6}
        text += f"{printed}\n  {e['step'] // 6}%|##        | {e['step']}/600 [00:10<01:00,  9.5it/s]\r"
    save("axolotl_kept.log", text)

    # ms-swift: steps as "5/93", the arguments beside it in JSON. Recovered.
    swift = [
        {k: v for k, v in e.items() if k != "step"} | {"global_step/max_steps": f"{e['step']}/1200"}
        for e in run(4, -15.0, -60.0, 0.05, entries=120, course=dip, spread=0.05)
    ]
    save("ms_swift_recovered/logging.jsonl", json_lines(swift))
    save("ms_swift_recovered/args.json", json.dumps({"rlhf_type": "dpo", "beta": 0.05, "loss_type": "sigmoid"}))

    # wandb history as CSV, with evaluations of two sets in rows of their own. Displaced on one, kept on the other.
    rows, columns = [], ["_step", "train/global_step"]
    for e in run(5, -8.0, -30.0, 0.1, evaluate=10):
        keep = {
            k.replace("eval_", "eval/hard_", 1) if k.startswith("eval_") else f"train/{k}": v
            for k, v in e.items()
            if k != "step"
        }
        rows.append({"_step": e["step"], "train/global_step": e["step"]} | keep)
    for e in run(6, 3.0, -30.0, 0.1, evaluate=10):
        keep = {k.replace("eval_", "eval/easy_", 1): v for k, v in e.items() if k.startswith("eval_")}
        rows += [{"_step": e["step"], "train/global_step": e["step"]} | keep] if keep else []
    columns += sorted({k for r in rows for k in r} - set(columns))
    save("wandb_displaced.csv", table(columns, sorted(rows, key=lambda r: r["_step"])))

    # A chart of wandb as CSV, with __MIN and __MAX. Kept.
    rows = [{"Step": e["step"]} | {f"run-7 - train/rewards/{s}{end}": e[f"rewards/{s}"] for s in ("chosen", "rejected")
            for end in ("", "__MIN", "__MAX")} for e in run(7, 5.0, -20.0, 0.1)]  # fmt: skip
    save("wandb_chart_kept.csv", table(list(rows[0]), rows))

    # SimPO in TRL: no reference, rewards = beta * mean per token. Displaced: -40 nats are -.5 per token.
    save("simpo_displaced.jsonl", json_lines(list(run(8, -40.0, -80.0, 2.0, free=True, per_token=True, evaluate=10))))

    # Two near-copies: the chosen fall and nothing is learned. Degenerate.
    save("similar_degenerate.jsonl", json_lines(list(run(9, -50.0, -50.5, 0.1, alike=True))))


if __name__ == "__main__":
    main()
