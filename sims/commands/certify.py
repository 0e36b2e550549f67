"""`displacement certify`: displacement proved by ball arithmetic."""

import argparse
from typing import Any

from sims.commands._shared import (
    EXIT_FAILED,
    EXIT_OK,
    command,
    file_arguments,
    json_flag,
    parse_assignments,
    rates_of,
    show,
)


def add(commands: Any) -> None:
    c = command(
        commands,
        "certify",
        run,
        "Prove that displacement happens, by ball arithmetic. Without a file: the No/Never/Yes scenario.\n"
        "With one: your pair. The result is a theorem about exactly these numbers, and about a box around them.\n"
        "Exit code 0: certified, 1: not certified, 2: the input was wrong.",
        "displacement certify embeddings.npz --preferred maybe --dispreferred perhaps --kappa inf --box 1e-5",
    )
    file_arguments(c, optional=True)  # nargs="?" for the file
    c.add_argument("--preferred", help="token y+ (scenario: No)")
    c.add_argument("--dispreferred", help="token y- (scenario: Never)")
    c.add_argument("--hidden", help=".npy file with the hidden vector (d,) of the prompt")
    c.add_argument("--start", metavar="TOKEN=LOG_ODDS,...", help="the start instead, as for `predict`")
    c.add_argument("--kappa", type=float, help="eta_h / eta_W; 0 freezes h, inf freezes W (1; scenario: 2)")
    c.add_argument("--loss", help="a loss whose flow is to be shown to get there; default: speak of every margin loss")
    c.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of that loss")
    c.add_argument("--margin", type=float, help="margin u1 to look at (the trough)")
    c.add_argument("--token", help="token said to gain (the one that gains most)")
    c.add_argument("--box", type=float, metavar="EPS", help="also for every W, h within EPS, entry by entry")
    c.add_argument(
        "--thorough", action="store_true", default=None, help="whole path and largest box beyond 4096 tokens"
    )
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    import numpy as np

    from sims.certificate import certify
    from sims.embeddings import read_embeddings
    from theory.losses import get

    rates: dict[str, Any] = {}
    if arguments.kappa is not None:
        if not arguments.kappa >= 0:
            raise ValueError(f"--kappa must be in [0, inf], got {arguments.kappa:g}")
        eta_W, eta_h = rates_of(arguments.kappa)
        rates = {"lr_unembedding": eta_W, "lr_hidden": eta_h}
    if arguments.set and not arguments.loss:
        raise ValueError(f"--set needs --loss, got --set {arguments.set[0]}")
    if arguments.file and not (arguments.preferred and arguments.dispreferred):
        raise ValueError("--preferred and --dispreferred must be given with a file")
    embeddings = None
    if arguments.file:
        embeddings = read_embeddings(arguments.file, tensor=arguments.tensor, tokens_path=arguments.tokens_file)
    start: Any = parse_assignments(arguments.start.split(","), "--start") if arguments.start else None
    certificate = certify(
        embeddings,
        arguments.preferred or "No",
        arguments.dispreferred or "Never",
        hidden=np.load(arguments.hidden, allow_pickle=False) if arguments.hidden else None,
        start=start,
        loss=get(arguments.loss, **parse_assignments(arguments.set, "--set")) if arguments.loss else None,
        margin=arguments.margin,
        token=arguments.token,
        box=arguments.box,
        thorough=arguments.thorough,
        **rates,
    )
    show(certificate, arguments.json)
    return EXIT_OK if certificate.certified else EXIT_FAILED
