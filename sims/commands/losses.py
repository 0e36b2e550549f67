"""`displacement losses`: the registry of losses."""

import argparse
from typing import Any

from sims.commands._shared import EXIT_OK, command, json_flag


def add(commands: Any) -> None:
    c = command(
        commands,
        "losses",
        run,
        "The registry of losses as a table: name, parameters with their domains, formula, claims, source.",
        "displacement losses --json",
    )
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    import dataclasses

    from sims.files import to_json
    from theory.losses import LOSSES, MarginLoss

    rows = []
    for name, cls in LOSSES.items():
        loss: Any = cls()
        rows.append(
            {
                "name": name,
                "parameters": {f.name: f"{f.default:g} in {f.metadata['domain']}" for f in dataclasses.fields(loss)},
                "latex": loss.latex(),
                "claims": dataclasses.asdict(loss.claims),
                "minimiser_at_u_ref_0": loss.minimiser(0.0) if isinstance(loss, MarginLoss) else None,
                "summary": (cls.__doc__ or "").strip().splitlines()[0],
                "reference": cls.reference,
            }
        )
    if arguments.json:
        print(to_json(rows), end="")
        return EXIT_OK
    for row in rows:
        claims = ", ".join(("" if held else "not ") + c.replace("_", "-") for c, held in row["claims"].items())
        print(f"{row['name']}\n    {row['summary']}")
        print("    parameters  " + (", ".join(f"{p} = {v}" for p, v in row["parameters"].items()) or "none"))
        print(f"    claims      {claims}\n    source      {row['reference']}")
    return EXIT_OK
