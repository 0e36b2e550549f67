"""`displacement diagnose`: a training log."""

import argparse
from pathlib import Path
from typing import Any

from sims.commands._shared import EXIT_FOUND, EXIT_OK, command, flag, json_flag

FAIL_ON = "displaced,degenerate"


def add(commands: Any) -> None:
    c = command(
        commands,
        "diagnose",
        run,
        "Why is my chosen reward falling? Reads the log of a finished or running preference training and says whether\n"
        "the log-probability of the chosen responses fell, how far, whether it came back, and what to try. LOG is\n"
        "trainer_state.json or the folder it is in (TRL, LLaMA-Factory, axolotl), JSON lines (OpenRLHF), CSV (wandb),\n"
        "or captured output. Exit code 3 if the verdict is one of --fail_on.",
        "displacement diagnose outputs/dpo --beta 0.1 --html diagnosis.html",
    )
    c.add_argument("log", metavar="LOG", type=Path, help="file or folder")
    flag(c, "beta", type=float, help="of the training (default: from the log where it can be told)")
    flag(c, "loss", metavar="NAME", help="of the training; matters for ipo, simpo, orpo and cpo")
    flag(c, "per_token", action="store_true", help="the logged log-probabilities are means per token")
    flag(c, "threshold", type=float, metavar="NATS", help="a smaller fall of the chosen is none (default: 0.1)")
    flag(c, "html", type=Path, metavar="FILE", help="also write a page with figures")
    flag(c, "fail_on", default=FAIL_ON, metavar="LIST", help="verdicts with exit code 3, or none (%(default)s)")
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.diagnosis import diagnose, read_log
    from sims.diagnosis.advice import advise
    from sims.diagnosis.page import write_page
    from sims.diagnosis.verdict import THRESHOLD
    from sims.files import to_json

    fail_on = _verdicts(arguments.fail_on)
    if arguments.html is not None and arguments.html.is_dir():
        raise ValueError(f"--html must be a file, got the folder {str(arguments.html)!r}")
    threshold = THRESHOLD if arguments.threshold is None else arguments.threshold
    log = read_log(arguments.log)
    d = diagnose(log, beta=arguments.beta, loss=arguments.loss, per_token=arguments.per_token, threshold=threshold)
    advice = advise(d)
    if arguments.json:
        print(to_json(d.to_dict() | {"advice": [a.to_dict() for a in advice]}), end="")
    else:
        print("\n".join([str(d), *(["", "What to try:"] if advice else []), *map(str, advice)]))
    if arguments.html is not None:
        write_page(d, arguments.html)
        if not arguments.json:
            print(f"\nPage: {arguments.html}")
    return EXIT_FOUND if d.verdict in fail_on else EXIT_OK


def _verdicts(text: str) -> set[str]:
    from sims.diagnosis.verdict import RULES

    names = {" ".join(n.replace("_", " ").split()) for n in text.split(",")} - {"", "none"}
    if unknown := names - set(RULES):
        raise ValueError(
            f"--fail_on must list verdicts ({', '.join(RULES)}) or be none, got {', '.join(sorted(unknown))}"
        )
    return names
