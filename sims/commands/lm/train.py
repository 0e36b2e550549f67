"""`displacement lm train`: a small language model from nothing."""

import argparse
import dataclasses
import importlib
import shlex
import sys
from pathlib import Path
from typing import Any

from sims.commands._shared import EXIT_OK, check_folder, command, json_flag
from theory import __version__

WORLDS = {"persona": "PersonaWorld", "requests": "RequestsWorld"}


def add(commands: Any) -> None:
    c = command(
        commands,
        "train",
        run,
        "Train a small language model on a world. A world is a generator of texts; every frequency in it is a field\n"
        "(--set NAME=VALUE, listed by --fields). A run that was stopped goes on where it was. Writes DIR/model, for\n"
        "`--model` of the experiments, and DIR/state, which lets it resume.",
        "displacement lm train persona --seed 1 --set never=0.1 --out my-model",
    )
    c.add_argument("world", choices=sorted(WORLDS), help="what the texts are about")
    c.add_argument("--fields", action="store_true", help="list the fields of the world and stop")
    c.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the world")
    c.add_argument("--data", type=Path, metavar="FILE", help="persona: statements in the form of the paper's file")
    c.add_argument("--seed", type=int, default=0, help="of the weights and the order of the texts (%(default)s)")
    for name, text in (("steps", "training steps"), ("batch", "texts in each"), ("every", "steps between checkpoints")):
        c.add_argument(f"--{name}", type=int, help=f"{text} (the recipe of the world)")
    c.add_argument("--lr", type=float, help="learning rate (the recipe of the world)")
    for name, text in (("d", "hidden size"), ("layers", "layers"), ("heads", "attention heads")):
        c.add_argument(f"--{name}", type=int, help=f"{text} (the recipe of the world)")
    c.add_argument("--out", type=Path, metavar="DIR", help="folder (displacement-lm-WORLD)")
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    module = importlib.import_module(f"sims.language.worlds.{arguments.world}")
    world = world_of(getattr(module, WORLDS[arguments.world]), arguments.set, arguments.data)
    if arguments.fields:
        print(f"{type(world).__doc__}\n" + "\n".join(f"{k} = {v}" for k, v in world.to_dict().items()))
        return EXIT_OK
    from sims.files import to_json
    from sims.language.fitting import fit
    from sims.language.model import new_model, save

    out = check_folder(arguments.out or Path(f"displacement-lm-{arguments.world}"))
    recipe = dataclasses.replace(
        module.RECIPE, seed=arguments.seed, **_given(arguments, "steps", "batch", "every", "lr")
    )
    size = {**module.SIZE, **_given(arguments, "d", "layers", "heads")}
    start = new_model(world.words(), **size, seed=arguments.seed)
    what = {"world": arguments.world, **world.to_dict()}
    model = fit(start, world.texts, recipe, out / "state", what=what, progress=sys.stderr.isatty())
    model.training.update({"size": size, "command": _command(arguments)})
    save(model, out / "model")
    record = {
        "version": __version__,
        "fingerprint": model.fingerprint,
        "words": len(world.words()),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "nats_per_token": {"untrained": held_out(start, world), "trained": held_out(model, world)},
        "training": model.training,
    }
    print(to_json(record) if arguments.json else _table(model, record), end="" if arguments.json else "\n")
    if not arguments.json:
        print(f"\nwritten to {out}/: model (use it by --model {out / 'model'}) and state")
    return EXIT_OK


def world_of(cls: Any, assignments: list[str], data: Path | None) -> Any:
    """The world with fields set by NAME=VALUE texts; a ValueError names the field or the text that is wrong."""
    from theory._check import unknown

    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    if data is not None and "data" not in fields:
        raise ValueError("--data is for the persona world")
    values: dict[str, Any] = {} if data is None else {"data": str(data)}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set must look like NAME=VALUE, got {text!r}")
        if name not in fields:
            raise ValueError("--set: " + unknown("field", name, fields))
        if name in values:
            raise ValueError(f"--set gives {name!r} twice")
        values[name] = _value(text, value, fields[name])
    return cls(**values)


def _value(text: str, value: str, default: Any) -> Any:
    """The text in the type of the field's default."""
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"--set must be true or false here, got {text!r}")
        return value.lower() == "true"
    if not isinstance(default, int | float):
        return value
    try:
        return type(default)(value)
    except ValueError:
        raise ValueError(f"--set must be a number of type {type(default).__name__} here, got {text!r}") from None


def held_out(model: Any, world: Any, n: int = 256) -> float:
    """Mean of -ln pi(token | before) over n texts of the world drawn by a seed of their own, in nats."""
    import numpy as np

    from sims.language.responses import log_probs

    texts = [model.response(text) for text in world.texts(np.random.default_rng([2**31, 0]), n)]
    found = log_probs(model, [model.prompt("")] * n, texts)
    return float(-found.sum() / sum(map(len, texts)))


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _command(arguments: argparse.Namespace) -> str:
    given = _given(arguments, "seed", "data", "steps", "batch", "every", "lr", "d", "layers", "heads")
    options = [("--set", text) for text in arguments.set] + [(f"--{name}", str(v)) for name, v in given.items()]
    return shlex.join(["displacement", "lm", "train", arguments.world, *(word for pair in options for word in pair)])


def _table(model: Any, record: dict[str, Any]) -> str:
    from sims.language.responses import sample

    nats = record["nats_per_token"]
    said = sample(model, [model.prompt("")] * 6, max_tokens=30, seed=0)
    return "\n".join(
        [
            f"{model!r}, {record['words']} words",
            f"loss on texts drawn anew: {nats['untrained']:.3f} -> {nats['trained']:.3f} nats per token",
            f"fingerprint {record['fingerprint'][:16]}; command: {record['training']['command']}",
            "what it says:",
            *(f"  {model.text(ids)}" for ids in said),
        ]
    )
