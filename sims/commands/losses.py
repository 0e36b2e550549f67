"""`displacement losses`: the registry of losses."""

import argparse
import dataclasses
from typing import Any

from sims.commands._shared import EXIT_OK, command, json_flag


def add(commands: Any) -> None:
    c = command(
        commands,
        "losses",
        run,
        "The registry of losses as a table: name, kind, parameters with their domains, formula, claims, source.",
        "displacement losses --markdown > losses.md",
    )
    form = c.add_mutually_exclusive_group()
    json_flag(form)
    form.add_argument("--markdown", action="store_true", help="print a Markdown table with the formulas")


def run(arguments: argparse.Namespace) -> int:
    from sims.files import to_json
    from theory.losses import LOSSES

    rows = [_row(cls()) for cls in LOSSES.values()]
    if arguments.json:
        print(to_json(rows), end="")
    elif arguments.markdown:
        print(_markdown(rows))
    else:
        for row in rows:
            print(_text(row))
        print(f"{len(rows)} losses. a = ln pi(y+), b = ln pi(y-), a_ref, b_ref: of the reference model, u = a - b.")
    return EXIT_OK


def _row(loss: Any) -> dict[str, Any]:
    from theory.losses import MarginLoss, TokenLoss

    margin, tokens = isinstance(loss, MarginLoss), isinstance(loss, TokenLoss)
    kind = "margin" if margin else "tokens" if tokens else "pair"
    return {
        "name": loss.name,
        "kind": kind + (", coupled" if loss.coupled else ""),
        "parameters": {f.name: _parameter(f) for f in dataclasses.fields(loss)},
        "latex": loss.latex(),
        "claims": {} if tokens else dataclasses.asdict(loss.claims),
        "minimiser_at_u_ref_0": loss.minimiser(0.0) if margin else None,
        "summary": (type(loss).__doc__ or "").strip().splitlines()[0],
        "reference": loss.reference,
    }


def _parameter(f: Any) -> str:
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    if "domain" not in f.metadata:
        return f"{default}"
    return f"{default:g} in {f.metadata['domain']}"


def _claims(row: dict[str, Any]) -> str:
    return ", ".join(("" if held else "not ") + c.replace("_", "-") for c, held in row["claims"].items())


def _text(row: dict[str, Any]) -> str:
    lines = [
        f"{row['name']}\n    {row['summary']}",
        f"    kind        {row['kind']}",
        "    parameters  " + (", ".join(f"{p} = {v}" for p, v in row["parameters"].items()) or "none"),
        f"    claims      {_claims(row)}" if row["claims"] else "",
        f"    source      {row['reference']}",
    ]
    return "\n".join(line for line in lines if line)


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| loss | kind | formula | claims | source |", "|---|---|---|---|---|"]
    for row in rows:
        latex = row["latex"].replace(r"\|", r"\Vert ").replace("|", r"\vert ")  # a bare | ends a table cell
        lines.append(f"| `{row['name']}` | {row['kind']} | ${latex}$ | {_claims(row)} | {row['reference']} |")
    return "\n".join(lines)
