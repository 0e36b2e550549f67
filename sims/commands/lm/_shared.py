"""What the subcommands of `displacement lm` share: options, losses, models, and how results are written."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sims.commands._shared import check_folder, json_flag


def options(
    c: argparse.ArgumentParser,
    name: str,
    checkpoint: str,
    seeds: int | None = None,
    loss: str | None = None,
    losses: str | None = None,
) -> None:
    """The options of an experiment; those that are None are left out.

    seeds, loss : defaults of --seeds and --loss. losses : --loss may be repeated (`losses_of` reads it); what the help
        calls its default.
    """
    c.add_argument("--model", metavar="PATH", help=f"a model's folder or hub name (the {checkpoint} model shipped)")
    if loss is not None or losses is not None:
        text = "a loss of the registry, e.g. ipo:tau=0.2 or dpo+sft:0.1"
        form = "NAME[:PARAMETER=VALUE,...][+sft:WEIGHT]"
        if losses is None:
            c.add_argument("--loss", metavar=form, default=loss, help=f"{text} (%(default)s)")
        else:
            c.add_argument("--loss", metavar=form, action="append", help=f"{text}, may be repeated ({losses})")
    if seeds is not None:
        c.add_argument("--seeds", type=int, default=seeds, help="training seeds (%(default)s)")
    c.add_argument("--workers", type=int, help="processes (one per core)")
    c.add_argument("--fast", action="store_true", help="a small version, to see what comes out")
    c.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path(f"displacement-lm-{name}"),
        help="for results, figures and what lets a killed run resume (%(default)s)",
    )
    json_flag(c)


def parse_loss(text: str) -> Any:
    """A loss from NAME[:PARAMETER=VALUE,...][+sft:WEIGHT]; a ValueError names the part that is wrong."""
    from theory.losses import SFT, get

    main, plus, extra = text.partition("+")
    name, _, assignments = main.partition(":")
    parameters: dict[str, Any] = {}
    for assignment in filter(None, assignments.split(",")):
        key, equals, value = assignment.partition("=")
        if not equals or not key or not value or key in parameters:
            raise ValueError(f"--loss must look like NAME:PARAMETER=VALUE,... with each once, got {text!r}")
        parameters[key] = _number(value)
    try:
        loss = get(name, **parameters)
    except TypeError as error:
        raise ValueError(f"--loss {text!r} has a parameter of the wrong kind ({error})") from error
    if not plus:
        return loss
    term, _, weight = extra.partition(":")
    if term != "sft" or not isinstance(_number(weight), float):
        raise ValueError(f"--loss may end in +sft:WEIGHT, got {text!r}")
    return SFT(loss, float(weight))


def losses_of(arguments: argparse.Namespace, default: Sequence[Any]) -> list[Any]:
    """The losses that were asked for, or the default."""
    return [parse_loss(text) for text in arguments.loss] if arguments.loss else list(default)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def model_of(arguments: argparse.Namespace, checkpoint: str) -> Any:
    """The model that was asked for, or the shipped one."""
    from sims.language.model import load, shipped

    check_folder(arguments.out)
    return shipped(checkpoint) if arguments.model is None else load(arguments.model)


def finish(
    arguments: argparse.Namespace,
    name: str,
    result: Any,
    model: Any,
    draw: Callable[[Any, Path], Iterable[Path]],
) -> None:
    """Print the result, write <out>/<name>.json with what produced it (`sims.language.report` reads it), and draw.

    result : with `.to_dict()` and a readable `str`. model : the LanguageModel the experiment started from.
    draw : (result, folder) -> the figures written.
    """
    from sims.files import to_json, write_atomically
    from theory import __version__

    record = {
        "experiment": arguments.subcommand,
        "version": __version__,
        "model": {"fingerprint": model.fingerprint, "training": model.training},
        "options": options_of(arguments),
        "result": result.to_dict(),
    }
    text = to_json(record)
    print(text if arguments.json else result, end="" if arguments.json else "\n")
    written = [write_atomically(arguments.out / f"{name}.json", text), *draw(result, arguments.out)]
    if not arguments.json:
        print(f"\nwritten to {arguments.out}/: " + ", ".join(sorted(path.name for path in written)))


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as JSON values, without what does not decide the result."""
    aside = ("command", "subcommand", "run", "out", "json", "workers")
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in aside}
