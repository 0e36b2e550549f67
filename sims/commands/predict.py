"""`displacement predict`: what the theory says of a pair on a real matrix."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sims.commands._shared import (
    EXIT_OK,
    command,
    file_arguments,
    json_flag,
    loss_arguments,
    parse_assignments,
    rates_of,
    show,
)


def add(commands: Any) -> None:
    c = command(
        commands,
        "predict",
        run,
        "What the theory says of a pair on a real unembedding matrix, before any training: can it displace at all\n"
        "(r_max), above which ratio of rates (kappa*), how deep, and who gains.",
        "displacement predict embeddings.npz --preferred maybe --dispreferred perhaps --kappa inf",
    )
    file_arguments(c)
    c.add_argument("--preferred", required=True, help="token y+")
    c.add_argument("--dispreferred", required=True, help="token y-")
    c.add_argument("--hidden", help=".npy file with the hidden vector (d,) of the prompt")
    c.add_argument(
        "--start",
        metavar="TOKEN=LOG_ODDS,...",
        help="the start instead: TOKEN=LOG_ODDS,... against the average token (nats); the shortest hidden vector with "
        "these is used. Default: y+ at probability 0.7 and y- at a tenth of it",
    )
    loss_arguments(c)
    c.add_argument(
        "--kappa",
        type=float,
        default=1.0,
        help="eta_h / eta_W: how fast h moves against W; 0 freezes h, inf freezes W (%(default)s)",
    )
    c.add_argument("--top", type=int, default=10, help="tokens to list (%(default)s)")
    c.add_argument("--figure", type=Path, metavar="FILE", help="write the figure here (.png, .svg or .pdf)")
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    import numpy as np

    from sims.embeddings import read_embeddings
    from sims.predict import predict
    from theory.losses import get

    if arguments.figure and arguments.figure.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--figure must end in .png, .svg or .pdf, got {str(arguments.figure)!r}")
    eta_W, eta_h = rates_of(arguments.kappa)
    embeddings = read_embeddings(arguments.file, tensor=arguments.tensor, tokens_path=arguments.tokens_file)
    hidden = np.load(arguments.hidden, allow_pickle=False) if arguments.hidden else None
    start: Any = parse_assignments(arguments.start.split(","), "--start") if arguments.start else None
    prediction = predict(
        embeddings,
        arguments.preferred,
        arguments.dispreferred,
        hidden=hidden,
        start=start,
        loss=get(arguments.loss, **parse_assignments(arguments.set, "--set")),
        lr_unembedding=eta_W,
        lr_hidden=eta_h,
        top=arguments.top,
    )
    show(prediction, arguments.json)
    if arguments.figure:
        from sims.plots import save_prediction

        save_prediction(prediction.flow, prediction.displacement, arguments.figure)
        print(f"figure written to {arguments.figure}", file=sys.stderr)
    return EXIT_OK
