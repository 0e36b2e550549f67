"""Derives trl_losses.json, the small table of TRL's own numbers that the tests keep, from the full one.

    python tests/data/make_trl_losses.py path/to/full/trl_losses.json

The full table holds losses and gradients that TRL's trainers computed (its header says how). Of every configuration
this keeps a few rows: one per value of beta and pair of lengths, at low, middle and high margins in turn, those with the
largest log-ratios of each sign, every row at a kink, and every row where TRL gives NaN.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TICK = 2.0**-14  # every log-probability in the table is a multiple of it
LOGPS = ("logp_plus", "logp_minus", "ref_plus", "ref_minus")
TOKENS = ("token_logp_plus", "token_logp_minus", "token_ref_plus", "token_ref_minus")
TOKEN_GRADS = ("token_grad_plus", "token_grad_minus")
SIDE_INPUTS = ("kl_mean", "delta", "logp_prompt", "log_sum_sq_probs_plus", "log_sum_sq_probs_minus")
DROPPED = ("kl_logps", "kl_ref_logps", "loss_type")  # kl_mean says the first two; loss_type repeats the row's own
COLUMNS = ("config", "id", "beta", "n_plus", "n_minus", *LOGPS, "side", "value", "grad_plus", "grad_minus")


def config(row: dict[str, Any]) -> str:
    """What a row has in common with others: trainer, loss, options, precision."""
    options = {k: v for k, v in row["options"].items() if k not in SIDE_INPUTS + DROPPED}
    kept = {k: row[k] for k in ("trainer", "loss_type", "dtype", "constants", "batch", "trl") if k in row}
    return json.dumps({**kept, "options": options}, sort_keys=True)


def log_ratios(row: dict[str, Any]) -> tuple[float, float]:
    """(da, db), summed over a batch; log-probabilities where there is no reference."""
    a, b, a_ref, b_ref = (sum(v) if isinstance(v, list) else v or 0.0 for v in (row[k] for k in LOGPS))
    return a - a_ref, b - b_ref


def choose(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one configuration that say most."""
    corners = [(1, -1), (-1, 1), (1, 1), (-1, -1)]
    kept = [max(rows, key=lambda r: sum(s * x for s, x in zip(signs, log_ratios(r), strict=True))) for signs in corners]
    kept += [r for r in rows if r.get("kink") or r["value"] == "nan"]
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(json.dumps([row["beta"]] + ([] if "batch" in row else [row["n_plus"]])), []).append(row)
    for i, cell in enumerate(cells.values()):
        cell.sort(key=lambda r: log_ratios(r)[0] - log_ratios(r)[1])
        kept.append(cell[(i % 3) * (len(cell) - 1) // 2])
    return sorted({r["id"]: r for r in kept}.values(), key=lambda r: r["id"])


def ticks(value: Any) -> Any:
    """Log-probabilities as whole numbers of 2^-14, which is shorter and exact."""
    if value is None:
        return None
    if isinstance(value, list):
        return [ticks(v) for v in value]
    assert value / TICK == int(value / TICK), value
    return int(value / TICK)


def pack(row: dict[str, Any], configs: list[str]) -> list[Any]:
    """The row in the order of COLUMNS; a token row holds lists over tokens in place of sums."""
    by_token = TOKENS[0] in row
    side = {k: row["options"][k] for k in SIDE_INPUTS if k in row["options"]}
    if row.get("kink"):
        side["kink"] = True
    logps = [ticks(row[k]) for k in (TOKENS if by_token else LOGPS)]
    grads = [row[k] for k in (TOKEN_GRADS if by_token else ("grad_plus", "grad_minus"))]
    place = configs.index(config(row))
    return [place, row["id"], row["beta"], row["n_plus"], row["n_minus"], *logps, side or None, row["value"], *grads]


def derive(full: dict[str, Any], choose: Callable[[list[Any]], list[Any]] = choose) -> dict[str, Any]:
    """The table of the chosen rows."""
    by_config: dict[str, list[dict[str, Any]]] = {}
    for row in full["rows"]:
        by_config.setdefault(config(row), []).append(row)
    configs = list(by_config)
    rows = [pack(r, configs) for group in by_config.values() for r in choose(group)]
    kept = ("what", "trl", "torch", "transformers", "date", "dtype", "tolerances")
    header = {k: full["header"][k] for k in kept}
    header["derived"] = f"{len(rows)} of {full['header']['rows_here']} rows, by make_trl_losses.py"
    header["units"] = "logp_*, ref_*: whole numbers of 2**-14 nats; everything else as in the full table"
    header["fields"] = full["header"]["fields"]
    return {"header": header, "configs": [json.loads(c) for c in configs], "columns": COLUMNS, "rows": rows}


def main(source: str) -> None:
    small = derive(json.loads(Path(source).read_text()))
    target = Path(__file__).with_name("trl_losses.json")
    header, columns = json.dumps(small["header"], indent=1), json.dumps(small["columns"])
    configs, rows = (",\n".join(json.dumps(x, separators=(",", ":")) for x in small[k]) for k in ("configs", "rows"))
    target.write_text(
        f'{{"header": {header},\n"configs": [\n{configs}\n],\n"columns": {columns},\n"rows": [\n{rows}\n]}}\n'
    )
    print(f"{target.name}: {len(small['rows'])} rows, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
