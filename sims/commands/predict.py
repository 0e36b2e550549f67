"""`displacement predict`: what the theory says of a pair before any training, on a matrix or on a language model."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sims.commands._shared import (
    EXIT_FOUND,
    EXIT_OK,
    command,
    file_arguments,
    flag,
    json_flag,
    loss_arguments,
    model_arguments,
    model_of,
    parse_assignments,
    rates_of,
    show,
)

FIGURES = (".png", ".svg", ".pdf")
SIGN = ("adam", "adamw", "rmsprop")  # begin with a sign step


def add(commands: Any) -> None:
    c = command(
        commands,
        "predict",
        run,
        "Whether the preferred response will lose probability, before any training: at once, later or not, and who\n"
        "gains. On a language model (--model_name_or_path, --prompt): from its own first step on the pair, the exact\n"
        "path of the theory with its own W, h and features, and how far that forecast is good. On a matrix of\n"
        "unembeddings alone (FILE): can the pair displace at all (r_max), above which ratio of rates (kappa*), how\n"
        "deep. Exit code 3: a fall is foretold for the language model.",
        'displacement predict --model_name_or_path my-model --prompt "Is it true?" --preferred " No" '
        '--dispreferred " Never" --optimizer sign\n'
        "         displacement predict embeddings.npz --preferred maybe --dispreferred perhaps --kappa inf",
    )
    flag(c, "preferred", "chosen", required=True, help="y+: a text, where a space before it matters; in FILE, a token")
    flag(c, "dispreferred", "rejected", required=True, help="y-")
    loss_arguments(c)
    c.add_argument("--top", type=int, default=10, help="tokens to list (%(default)s)")
    c.add_argument("--figure", type=Path, metavar="FILE", help="write the figure here (.png, .svg or .pdf)")
    json_flag(c)
    model_arguments(c, required=False)
    _on_a_model(c.add_argument_group("on a language model"))
    _on_a_matrix(c)


def _on_a_model(group: Any) -> None:
    flag(group, "prompt", help="the prompt, as a text")
    flag(group, "chat", action="store_true", help="the prompt is what a user says: apply the chat template")
    flag(group, "eos", action="store_true", help="end responses with the end token, as trainers do for plain text")
    flag(
        group,
        "optimizer",
        choices=("sgd", "sign", *SIGN),
        help="adam, adamw and rmsprop are taken as sign, the step they begin with, which moves the body more "
        "(default: sgd)",
    )
    flag(group, "trained", choices=("both", "body", "head"), help="which weights (default: both)")
    flag(group, "candidate", action="append", metavar="TEXT", help="ask about this response too; may be repeated")
    flag(group, "samples", type=int, metavar="N", help="and about N responses drawn from the model")
    flag(group, "max_new_tokens", type=int, help="longest of these (default: 16)")
    flag(group, "seed", type=int, help="of the drawing (default: 0)")
    flag(group, "margin", type=float, metavar="NATS", help="how far to look ahead (default: 10)")


def _on_a_matrix(c: argparse.ArgumentParser) -> None:
    file_arguments(c, optional=True)
    c.add_argument("--hidden", help="FILE: .npy file with the hidden vector (d,) of the prompt")
    c.add_argument(
        "--start",
        metavar="TOKEN=LOG_ODDS,...",
        help="FILE: the start instead, against the average token (nats); the shortest hidden vector with these is "
        "used. Default: y+ at probability 0.7 and y- at a tenth of it",
    )
    c.add_argument(
        "--kappa",
        type=float,
        help="FILE: eta_h / eta_W, how fast h moves against W; 0 freezes h, inf freezes W (default: 1)",
    )


ON_A_MODEL = (
    "prompt",
    "chat",
    "eos",
    "optimizer",
    "trained",
    "candidate",
    "samples",
    "max_new_tokens",
    "seed",
    "margin",
)
ON_A_MATRIX = ("tensor", "tokens_file", "hidden", "start", "kappa")


def run(arguments: argparse.Namespace) -> int:
    if arguments.figure and arguments.figure.suffix not in FIGURES:
        raise ValueError(f"--figure must end in .png, .svg or .pdf, got {str(arguments.figure)!r}")
    if arguments.file is not None and Path(arguments.file).is_dir():
        raise ValueError(
            f"{arguments.file!r} is a folder: give a language model as --model_name_or_path {arguments.file}"
        )
    if (arguments.file is None) == (arguments.model_name_or_path is None):
        raise ValueError("give a language model (--model_name_or_path) or a FILE with unembeddings, one of the two")
    on_a_model = arguments.file is None
    for name in ON_A_MATRIX if on_a_model else ON_A_MODEL:
        if getattr(arguments, name) not in (None, False):
            other = "a FILE with unembeddings" if on_a_model else "--model_name_or_path"
            raise ValueError(f"--{name.replace('tokens_file', 'tokens-file')} goes with {other}")
    return (_model if on_a_model else _matrix)(arguments)


def _model(arguments: argparse.Namespace) -> int:
    from sims.language.outlook import ask, outlook
    from theory.losses import get

    if arguments.prompt is None:
        raise ValueError("--prompt must be given with --model_name_or_path")
    loss = get(arguments.loss, **parse_assignments(arguments.set, "--set"))
    # Steps smaller than half precision can tell are taken.
    model = model_of(arguments, dtype="float32" if arguments.dtype == "auto" else None)
    given = {
        k: getattr(arguments, k) for k in ("samples", "max_new_tokens", "seed") if getattr(arguments, k) is not None
    }
    question = ask(
        model,
        arguments.prompt,
        arguments.preferred,
        arguments.dispreferred,
        candidates=arguments.candidate or (),
        chat=arguments.chat,
        eos=arguments.eos,
        **given,
    )
    record = outlook(
        model,
        question,
        optimizer="sign" if arguments.optimizer in SIGN else arguments.optimizer or "sgd",
        trained=arguments.trained or "both",
        loss=loss,
        margin=10.0 if arguments.margin is None else arguments.margin,
        top=arguments.top,
        source=arguments.model_name_or_path,
        progress=True,
    )
    show(record, arguments.json)
    if arguments.figure:
        from sims.plots.outlook import save_outlook

        save_outlook(record, arguments.figure)
        print(f"figure written to {arguments.figure}", file=sys.stderr)
    return EXIT_OK if record.falls == "no" else EXIT_FOUND


def _matrix(arguments: argparse.Namespace) -> int:
    import numpy as np

    from sims.embeddings import read_embeddings
    from sims.predict import predict
    from theory.losses import get

    eta_W, eta_h = rates_of(1.0 if arguments.kappa is None else arguments.kappa)
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
