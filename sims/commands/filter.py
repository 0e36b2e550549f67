"""`displacement filter`: drop or weigh the pairs that push the chosen log-probability down."""

import argparse
from pathlib import Path
from typing import Any

from sims.commands._shared import EXIT_FOUND, EXIT_OK, command, flag, json_flag, show


def add(commands: Any) -> None:
    c = command(
        commands,
        "filter",
        run,
        "Drop the preference pairs whose chosen log-probability is expected to fall most, or give them weights, by a\n"
        "score of `displacement score` or any column of numbers; or take the best of several rejected responses. The\n"
        "rest is written in the layout and format it came in, with a report of what left and why.",
        "displacement filter scored.jsonl --by ln_ches --keep 0.95",
    )
    c.add_argument("dataset", nargs="?", help="scored data: what `displacement score` wrote, or any table with numbers")
    c.add_argument("--dataset", "--dataset_name", "--data", dest="named", metavar="D", help="the same, as an option")
    flag(c, "by", default="ches", metavar="COLUMN", help="the score (%(default)s)")
    flag(c, "output", metavar="FILE", help="where the rest goes (default: beside the data, as NAME.filtered.SUFFIX)")
    what = c.add_argument_group("what is done, one of")
    flag(what, "keep", type=float, metavar="Q", help="keep this fraction of the pairs that have a score")
    flag(
        what,
        "threshold",
        type=float,
        metavar="X",
        help="keep the pairs up to this score, or from it on where high is kept",
    )
    flag(what, "weights", action="store_true", help="keep all, with a column `weight` in [0, 1]")
    flag(what, "choose", action="store_true", help="of several rejected responses take one; also with the others")
    flag(c, "weight_target", type=float, default=0.5, metavar="W", help="with --weights: the weight (%(default)s)")
    flag(c, "weight_at", type=float, default=0.95, metavar="P", help="of the pair at this percentile (%(default)s)")
    flag(c, "order", choices=("low", "high"), help="the end that is kept (default: known for each score, else low)")
    flag(c, "keep_unusable", action="store_true", help="keep rows without a score")
    flag(c, "overwrite", action="store_true", help="replace an output that is there")
    flag(c, "drop_columns", action="store_true", help="leave the columns of scores out")
    flag(c, "split", help="of a data set that has several")
    flag(c, "layout", help="how rows are laid out (default: told from the columns)")
    flag(c, "column", action="append", default=[], metavar="ROLE=NAME", help="a column by its name; may be repeated")
    c.set_defaults(max_length=None)
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.commands._shared import table_of
    from sims.language.data.filter_run import filter_table
    from sims.language.data.filtering import FURTHER, SCORES
    from sims.language.data.table import open_table

    if (arguments.dataset is None) == (arguments.named is None):
        raise ValueError("say once which data to filter: displacement filter scored.jsonl, or --dataset scored.jsonl")
    arguments.dataset = arguments.dataset or arguments.named
    try:
        table, layout = table_of(arguments)
    except ValueError:
        if arguments.layout or arguments.column or arguments.choose:
            raise
        table, layout = open_table(arguments.dataset, split=arguments.split), None  # any table with a column of numbers
    done = filter_table(
        _output(arguments),
        table,
        arguments.by,
        keep=arguments.keep,
        threshold=arguments.threshold,
        weights=(arguments.weight_target, arguments.weight_at) if arguments.weights else None,
        one_of_several=arguments.choose,
        order=arguments.order,
        layout=layout,
        keep_unusable=arguments.keep_unusable,
        drop={*SCORES, *FURTHER} if arguments.drop_columns else (),
        progress=True,
    )
    show(done, arguments.json)
    return EXIT_FOUND if done.unusable else EXIT_OK


def _output(arguments: argparse.Namespace) -> Path:
    source = Path(arguments.dataset)
    if not arguments.output and not source.exists():
        raise ValueError(f"--output is needed for data of the hub, {arguments.dataset!r}")
    target = Path(arguments.output or source.with_name(f"{source.stem}.filtered{source.suffix}"))
    own = target.exists() and source.exists() and target.samefile(source)  # never replaced: `filter_table` says so
    if target.exists() and not own and not arguments.overwrite:
        raise ValueError(f"{str(target)!r} is there already: choose another --output or replace it with --overwrite")
    return target
