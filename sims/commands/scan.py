"""`displacement scan`: the pairs most prone to displacement."""

import argparse
import sys
from typing import Any

from sims.commands._shared import EXIT_OK, command, file_arguments, json_flag, show


def add(commands: Any) -> None:
    c = command(
        commands,
        "scan",
        run,
        "The pairs most prone to displacement among given or frequent tokens. Ranks ordered pairs by r_max: above 1\n"
        "some prompt and some ratio of rates make y+ fall from the start of training; at most 1 none does.",
        "displacement scan embeddings.npz --tokens yes,no,never,always,maybe,perhaps",
    )
    file_arguments(c)
    c.add_argument("--tokens", help="comma-separated tokens whose ordered pairs are tried")
    c.add_argument(
        "--candidates", type=int, default=200, help="without --tokens: that many frequent words (%(default)s)"
    )
    c.add_argument("--top", type=int, default=20, help="pairs to list (%(default)s)")
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.embeddings import read_embeddings
    from sims.scan import scan

    embeddings = read_embeddings(arguments.file, tensor=arguments.tensor, tokens_path=arguments.tokens_file)
    tokens = arguments.tokens.split(",") if arguments.tokens else None
    show(
        scan(embeddings, tokens, top=arguments.top, candidates=arguments.candidates, progress=sys.stderr.isatty()),
        arguments.json,
    )
    return EXIT_OK
