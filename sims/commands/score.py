"""`displacement score`: scores of preference pairs, added to the data as columns."""

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
    show,
    table_of,
)


def add(commands: Any) -> None:
    c = command(
        commands,
        "score",
        run,
        "Which preference pairs may lower the chosen log-probability: a score for every row. Adds columns (CHES and\n"
        "its length-normalised form, edit distance, lengths, ...) to the data, in the format and order they came in,\n"
        "drops nothing, and says which pairs stand out. Interrupted or killed, the same command goes on where it was.\n"
        "On several GPUs: accelerate launch -m sims score ...",
        "displacement score --model_name_or_path my-model --dataset pairs.jsonl --output scored.jsonl",
    )
    model_arguments(c)
    data_arguments(c)
    flag(c, "output", type=Path, help="where the scored data go (default: beside the data set, as NAME.scored.SUFFIX)")
    flag(c, "columns", nargs="+", metavar="NAME", help="scores instead of the usual ones, by their names")
    flag(
        c,
        "ref_logps",
        action="store_true",
        help="add ref_chosen_logps, ref_rejected_logps, which TRL takes as they are",
    )
    flag(c, "alpha", action="store_true", help="add the exact contribution of the unembedding")
    flag(c, "probe", action="store_true", help="add the exact first-order change under a step on the pair (slower)")
    flag(c, "batch_tokens", type=int, help="tokens of a batch, padding included: less if memory runs out")
    flag(c, "shard_rows", type=int, default=1024, help="rows stored at a time, what a kill costs at most (%(default)s)")
    flag(c, "restart", action="store_true", help="discard unfinished work and an older output")
    flag(c, "overwrite", action="store_true", help="replace columns of the data that have the name of a score")
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.language.scoring import cautions
    from sims.language.scoring.manifest import manifest
    from sims.language.scoring.processes import Group
    from sims.language.scoring.run import check_usable, score_table
    from sims.language.scoring.scorer import Scorer

    group = Group.here()
    columns = _columns(arguments)
    table, layout = table_of(arguments)
    output = _output(arguments, table, columns)
    arguments.device = group.device(arguments.device)
    model = model_of(arguments)
    _speed_up(model)
    scorer = Scorer(model, columns, max_length=arguments.max_length, batch_tokens=arguments.batch_tokens)
    encoder = scorer.encoder
    example = check_usable(model, table, layout, arguments.max_length)
    description = manifest(
        model,
        table,
        layout,
        name=arguments.model_name_or_path,
        revision=arguments.revision,
        split=arguments.split,
        options={
            "columns": columns,
            "max_length": arguments.max_length,
            "batch_tokens": encoder.batch_tokens,
            "shard_rows": arguments.shard_rows,
        },
    )
    summary = score_table(
        scorer,
        model,
        table,
        layout,
        output,
        description,
        shard_rows=arguments.shard_rows,
        overwrite=arguments.overwrite,
        restart=arguments.restart,
        group=group,
        warnings=cautions.of_model(model, encoder.head_deviation, encoder.head_noise, example),
    )
    if summary is None:  # one of several processes: the main one has the result
        return EXIT_OK
    show(summary, arguments.json)
    if group.size > 1:  # a launcher takes every other code for a crash and stops the rest
        return EXIT_OK
    return EXIT_FOUND if summary.unusable else EXIT_OK


def _columns(arguments: argparse.Namespace) -> list[str]:
    from sims.language.scoring.probe import PROBE
    from sims.language.scoring.scorer import COLUMNS, DEFAULT, LOGPS
    from theory._check import check_count, unknown

    for name in ("shard_rows", "batch_tokens"):
        if getattr(arguments, name) is not None:
            check_count(getattr(arguments, name), f"--{name}")
    asked = list(arguments.columns or DEFAULT)
    for name in asked:
        if name not in COLUMNS:
            raise ValueError(unknown("--columns", name, COLUMNS))
    more = {"ref_logps": LOGPS, "alpha": ("alpha",), "probe": PROBE}
    return list(dict.fromkeys([*asked, *(x for name, own in more.items() if getattr(arguments, name) for x in own)]))


def _output(arguments: argparse.Namespace, table: Any, columns: list[str]) -> Path:
    """Where the scored data go, checked before any work."""
    from sims.language.data.writing import kind_of

    data = Path(table.path)
    beside = data.with_name(f"{data.stem}.scored{data.suffix}") if data.exists() else Path(f"{data.name}.scored.jsonl")
    output = arguments.output or beside
    kind_of(output, table)
    if output.resolve() == data.resolve():
        raise ValueError(f"--output must not be the data set itself, got {str(output)!r}")
    there = sorted({*columns, "reason", "note"} & set(table.columns))
    if there and not arguments.overwrite:
        raise ValueError(
            f"dataset has columns that scores would have: {', '.join(there)}; replace them with --overwrite"
        )
    return output


def _speed_up(model: Any) -> None:
    """The fused attention, where the architecture has it."""
    try:
        model.network.set_attn_implementation("sdpa")
    except ValueError:
        model.network.set_attn_implementation("eager")
