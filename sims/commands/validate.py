"""`displacement validate`: which score foretells the fall of the chosen log-probability on this data and this model."""

import argparse
from pathlib import Path
from typing import Any

from sims.commands._shared import (
    EXIT_FOUND,
    EXIT_OK,
    command,
    data_arguments,
    flag,
    json_flag,
    model_arguments,
    model_of,
    table_of,
)


def add(commands: Any) -> None:
    c = command(
        commands,
        "validate",
        run,
        "Does CHES, or another score, foretell which pairs lower their chosen log-probability on your data? Pairs are\n"
        "drawn and scored, the model is trained for a few steps on each alone, always from the same weights, and the\n"
        "change is compared with every score: which is useful, which is no better than response length, what\n"
        "`displacement filter` would have removed. Your model is not changed on disk; an interrupted run goes on.\n"
        "Exit code 3: rows looked at could not be used.",
        "displacement validate --model_name_or_path my-model --dataset pairs.jsonl",
    )
    model_arguments(c)
    data_arguments(c)
    g = c.add_argument_group("training")
    flag(g, "pairs", type=int, metavar="N", help="drawn at random (64 times subset_size)")
    flag(g, "subset_size", type=int, default=1, metavar="K", help="pairs trained on together, disjoint (%(default)s)")
    flag(g, "percentiles", action="store_true", help="also pairs around five percentiles of each score; needs subsets")
    flag(
        g,
        "optimizer",
        default="adamw",
        choices=("sgd", "sign", "rmsprop", "adam", "adamw"),
        help="without weight decay, so adamw is adam, as TRL has it (%(default)s)",
    )
    flag(g, "learning_rate", type=float, metavar="X", help="default: sought, see margin_gain")
    flag(
        g,
        "margin_gain",
        type=float,
        default=10.0,
        metavar="NATS",
        help="by which the median run's margin grows at the learning rate sought (%(default)s)",
    )
    flag(g, "steps", type=int, default=10, help="of each run (%(default)s)")
    flag(
        g,
        "loss",
        default="dpo:beta=0.1",
        metavar="NAME[:PARAMETER=VALUE,...][+sft:WEIGHT]",
        help="see `displacement losses` (%(default)s)",
    )
    flag(g, "seed", type=int, default=0, help="of the draw of pairs and subsets (%(default)s)")
    flag(
        c,
        "out",
        type=Path,
        metavar="DIR",
        default=Path("displacement-validate"),
        help="for the result, the figure, and what lets an interrupted run go on (%(default)s)",
    )
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    import sys
    from dataclasses import replace

    from sims.commands._shared import check_folder
    from sims.commands.lm._shared import parse_loss
    from sims.files import to_json, write_atomically
    from sims.language.validation.study import FEWEST, draw_pairs, validate
    from sims.plots.validation import save_validation

    a, out = arguments, check_folder(arguments.out)
    for name in ("subset_size", "steps"):
        if getattr(a, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(a, name)}")
    count = 64 * a.subset_size if a.pairs is None else a.pairs
    if count < FEWEST * a.subset_size:
        raise ValueError(f"--pairs must be at least {FEWEST} times --subset_size, got {count}")
    if a.percentiles and a.subset_size < 2:
        raise ValueError("--percentiles needs --subset_size of at least 2")
    if a.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {a.seed}")
    loss = parse_loss(a.loss)
    table, layout = table_of(a)
    # Steps this small vanish in the rounding of half precision.
    model = model_of(a, dtype="float32" if a.dtype == "auto" else None)
    drawn = draw_pairs(model, table, layout, count, seed=a.seed, max_length=a.max_length)
    found = validate(
        model,
        drawn.pairs,
        loss,
        a.optimizer,
        learning_rate=a.learning_rate,
        margin_gain=a.margin_gain,
        steps=a.steps,
        subset_size=a.subset_size,
        percentiles=a.percentiles,
        seed=a.seed,
        where=drawn.where,
        folder=out / "runs",
        progress=True,
    )
    source = {"model": a.model_name_or_path, "dataset": a.dataset, "rows": drawn.rows, "asked": count}
    unusable = [f"{where}: {reason}" for where, reason in drawn.unusable]
    found = replace(found, parameters={**source, "unusable": unusable, **found.parameters})
    text = to_json(found.to_dict())
    print(text if a.json else found, end="" if a.json else "\n")
    written = [write_atomically(out / "validate.json", text), *save_validation(found, out)]
    print(f"\nwritten to {out}/: {', '.join(path.name for path in written)}", file=sys.stderr)
    return EXIT_FOUND if unusable else EXIT_OK
