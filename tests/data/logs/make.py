"""Makes the logs beside it: short runs of TRL's DPOTrainer, and what really happened in them.

    python tests/data/logs/make.py [NAME ...]

Every run trains the shipped model "requests" on 48 pairs of answers, on a CPU, in seconds. <NAME>/trainer_state.json is
what TRL wrote. truth.json holds the measured truth, which no line of the log takes part in: the mean ln pi of chosen and
rejected responses in nats, by sims.language.responses.log_probs on the model itself, of all training pairs and of the
held-out ones, as a change from the untrained model. TRL's own reward / beta on the same pairs is checked against it.
"""

import copy
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

from sims.files import to_json  # noqa: E402
from sims.language.model import LanguageModel, shipped  # noqa: E402
from sims.language.responses import log_probs  # noqa: E402
from sims.language.worlds.requests import RequestsWorld  # noqa: E402

PAIRS, HELD_OUT = 48, 16
WATCH = 5  # steps between two measurements of the truth
Text = tuple[str, str, str]  # prompt, chosen, rejected


def pairs(kind: str, seed: int = 0) -> tuple[list[Text], list[Text]]:
    """Pairs to train on and held-out ones.

    "alike" : two hard refusals, the same in most words. "compliant" : an answer that complies over a hard refusal.
    """
    world, rng = RequestsWorld(), np.random.default_rng(seed)
    found = []
    for request in world.split()[0][: PAIRS + HELD_OUT]:
        chosen = rejected = world.answer(rng, request, {"alike": "hard", "compliant": "comply"}[kind])
        while rejected == chosen:
            rejected = world.answer(rng, request, "hard")
        found.append((request.text, f" {chosen}", f" {rejected}"))
    return found[:PAIRS], found[PAIRS:]


def measure(model: LanguageModel, texts: list[Text]) -> tuple[float, float]:
    """Mean ln pi of the chosen and of the rejected responses, in nats per sequence."""
    prompts = [model.prompt(x) for x, _, _ in texts]
    return tuple(  # type: ignore[return-value]
        float(log_probs(model, prompts, [model.response(t[side]) for t in texts]).mean()) for side in (1, 2)
    )


def make(name: str, kind: str, reference: str = "same", evaluate: int = 0, **settings: Any) -> dict[str, Any]:
    """Train, keep the log, return the truth."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    start = shipped("requests")
    train, held_out = pairs(kind)
    network = copy.deepcopy(start.network)
    trained = LanguageModel(network, start.tokenizer)
    before = [measure(start, x) for x in (train, held_out)]
    truth: dict[str, list[float]] = {"step": []} | {
        f"{x}_{y}": [] for x in ("train", "held_out") for y in ("chosen", "rejected")
    }

    def look(step: int) -> None:
        truth["step"].append(step)
        for split, texts, first in zip(("train", "held_out"), (train, held_out), before, strict=True):
            network.eval()
            now = measure(trained, texts)
            network.train()
            for side, a, b in zip(("chosen", "rejected"), now, first, strict=True):
                truth[f"{split}_{side}"].append(a - b)

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            look(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % WATCH == 0:
                look(state.global_step)

    def table(texts: list[Text]) -> Dataset:
        return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), t, strict=True)) for t in texts])

    settings = {
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "bf16": False,
        "lr_scheduler_type": "constant",
    } | settings
    if evaluate:
        settings |= {"eval_strategy": "steps", "eval_steps": evaluate, "eval_on_start": True}
    twin = copy.deepcopy(start.network)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=network,
            ref_model=twin.to(torch.bfloat16) if reference == "bfloat16" else twin,
            args=DPOConfig(
                output_dir=folder,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=False,
                per_device_eval_batch_size=16,
                seed=0,
                **settings,
            ),
            train_dataset=table(train),
            eval_dataset=table(held_out) if evaluate else None,
            processing_class=start.tokenizer,
            callbacks=[Watch()],
        )
        trainer.train()
        logged = trainer.evaluate(trainer.train_dataset)
        trainer.state.log_history.pop()  # that evaluation is a check of ours, no part of the run
        (HERE / name).mkdir(exist_ok=True)
        trainer.state.save_to_json(str(HERE / name / "trainer_state.json"))
    beta = settings.get("beta", 0.1)
    reward = {side: logged[f"eval_rewards/{side}"] / beta for side in ("chosen", "rejected")}
    return {
        "loss_type": settings.get("loss_type", ["sigmoid"]),
        "loss_weights": settings.get("loss_weights"),
        "beta": beta,
        "pairs": kind,
        "learning_rate": settings["learning_rate"],
        "bf16": settings["bf16"],
        "reference": reference,
        "reward_over_beta": reward,
        **truth,
    }


def happened(truth: dict[str, Any]) -> str:
    """What the training pairs went through, from the measured truth."""
    chosen, rejected = np.array(truth["train_chosen"]), np.array(truth["train_rejected"])
    margin = chosen[-1] - rejected[-1]
    if not np.isfinite(margin) or (chosen[-1] < -30 and margin < 0.1 * -chosen[-1]):
        return "degenerate"
    if np.abs(chosen).max() < 0.05:
        return "nothing"
    if chosen[-1] < -0.5 and margin > 0.5:
        return "displaced"
    return "recovered" if chosen.min() < -0.5 and chosen[-1] > -0.1 else "kept" if chosen.min() > -0.1 else "unclear"


SFT = {"loss_type": ["sigmoid", "sft"]}
RUNS: dict[str, dict[str, Any]] = {
    "sigmoid_displaced": dict(kind="alike", learning_rate=1e-4, max_steps=60, evaluate=10),
    "sigmoid_kept": dict(kind="compliant", learning_rate=1e-4, max_steps=40),
    "sigmoid_recovered": dict(kind="compliant", learning_rate=3e-4, max_steps=300, logging_steps=5),
    "sigmoid_degenerate": dict(kind="alike", learning_rate=1e-1, max_steps=40, evaluate=10),
    "sigmoid_uniform": dict(kind="alike", learning_rate=1e6, max_steps=20),  # every token alike likely
    "sigmoid_nan": dict(kind="alike", learning_rate=1e38, max_steps=10),  # TRL logs a loss of 0 where it is NaN
    "sigmoid_nothing": dict(kind="alike", learning_rate=1e-6, max_steps=20),
    "ipo_displaced": dict(kind="alike", learning_rate=3e-4, max_steps=60, loss_type=["ipo"]),
    "ipo_kept": dict(kind="compliant", learning_rate=1e-4, max_steps=40, loss_type=["ipo"], beta=0.5, evaluate=10),
    "hinge_displaced": dict(kind="alike", learning_rate=3e-4, max_steps=60, loss_type=["hinge"], beta=0.3),
    "hinge_kept": dict(kind="compliant", learning_rate=1e-4, max_steps=60, loss_type=["hinge"], evaluate=10),
    "sft_displaced": dict(kind="alike", learning_rate=3e-4, max_steps=60, loss_weights=[1.0, 0.003], beta=0.05, **SFT),
    "sft_kept": dict(kind="alike", learning_rate=1e-4, max_steps=60, loss_weights=[1.0, 0.3], **SFT),
    "sft_recovered": dict(
        kind="compliant",
        learning_rate=5e-4,
        max_steps=100,
        logging_steps=2,
        loss_weights=[1.0, 0.01],
        evaluate=10,
        **SFT,
    ),
    "bf16_displaced": dict(
        kind="alike", learning_rate=1e-4, max_steps=60, bf16=True, reference="bfloat16", evaluate=10
    ),
    # TRL's habits: a point every 10 steps, batches gathered over several backward passes, a rate that decays.
    "sparse_displaced": dict(
        kind="alike",
        learning_rate=5e-4,
        max_steps=60,
        logging_steps=10,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        lr_scheduler_type="linear",
    ),
}


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    file = HERE / "truth.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    for name in names or RUNS:
        known[name] = truth = make(name, **RUNS[name])
        known[name]["happened"] = happened(truth)
        designed = name.split("_")[1].replace("uniform", "degenerate").replace("nan", "degenerate")
        if truth["happened"] != designed:
            raise RuntimeError(f"{name}: {known[name]['happened']}")
        last = {k: round(truth[f"train_{k}"][-1], 3) for k in ("chosen", "rejected")}
        print(name, truth["happened"], last, truth["reward_over_beta"])
        file.write_text(to_json({k: known[k] for k in RUNS if k in known}))


if __name__ == "__main__":
    main(sys.argv[1:])
