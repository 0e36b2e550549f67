"""`displacement demo`: The No/Never/Yes study."""

import argparse
from pathlib import Path
from typing import Any

from sims.commands._shared import EXIT_OK, check_folder, command, json_flag
from theory import __version__


def add(commands: Any) -> None:
    c = command(
        commands,
        "demo",
        run,
        "The No/Never/Yes example, solved exactly, integrated and trained. Prefer `No` over `Never` by DPO and watch\n"
        "`No` fall while `Yes` rises: the closed form, a numerical integration and gradient descent side by side.\n"
        "Prints a table; writes figures, the data behind them and demo.json.",
        "displacement demo --out my-demo",
    )
    c.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("displacement-demo"),
        help="folder for figures and data (%(default)s)",
    )
    c.add_argument("--draws", type=int, default=500, help="random geometries per noise size (%(default)s)")
    c.add_argument("--seed", type=int, default=0, help="seed of those geometries (%(default)s)")
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.files import to_json, write_atomically
    from sims.plots import save_figures
    from sims.scenarios.no_never_yes import no_never_yes

    check_folder(arguments.out)
    study = no_never_yes(draws=arguments.draws, seed=arguments.seed)
    text = to_json({"version": __version__, **study.to_dict()})
    print(text if arguments.json else study.report(), end="" if arguments.json else "\n")
    write_atomically(arguments.out / "demo.json", text)
    written = save_figures(study, arguments.out)
    if not arguments.json:
        print(f"\nwritten to {arguments.out}/: demo.json and")
        for path in written:
            print(f"  {path.name}")
    return EXIT_OK
