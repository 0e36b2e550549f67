"""The `displacement` command: argument parsing and printing only."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theory import SolverError, __version__

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 the computation failed, 2 the input was wrong."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"displacement {arguments.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except SolverError as error:
        print(f"displacement {arguments.command}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"displacement {arguments.command}: interrupted; nothing half-written is left behind", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line, one function per command below."""
    top = argparse.ArgumentParser(
        prog="displacement",
        description="Why the probability of a preferred response falls under preference optimisation, exactly.",
        epilog="Start with `displacement demo`. Exit codes: 0 done, 1 the computation failed, 2 the input was wrong.",
    )
    top.add_argument("--version", action="version", version=f"displacement {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_demo, _predict, _scan, _losses, _verify, _certify, _bench):
        add(commands)
    return top


def _command(commands: Any, name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
    new = commands.add_parser(
        name,
        help=text.split(":")[0].split(". ")[0].rstrip("."),
        description=text,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    new.set_defaults(run=run)
    return new


def _json_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON for machines instead of a table")


def _show(record: Any, as_json: bool) -> None:
    from sims.files import to_json

    print(to_json(record.to_dict()) if as_json else record, end="" if as_json else "\n")


# ---- demo


def _demo(commands: Any) -> None:
    c = _command(
        commands,
        "demo",
        run_demo,
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
    _json_flag(c)


def run_demo(arguments: argparse.Namespace) -> int:
    from sims.files import to_json, write_atomically
    from sims.plots import save_figures
    from sims.scenarios.no_never_yes import no_never_yes

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


# ---- predict and scan


def _file_arguments(c: argparse.ArgumentParser, optional: bool = False) -> None:
    c.add_argument(
        "file",
        nargs="?" if optional else None,
        help=".npz with arrays `unembedding` (V, d) and `tokens` (V,), or .safetensors with the unembedding and the "
        "tokens beside it (tokenizer.json, vocab.json, tokens.txt)",
    )
    c.add_argument("--tensor", help="name of the unembedding tensor in a .safetensors file")
    c.add_argument("--tokens-file", help="file of token names, one per row of the matrix")


def _predict(commands: Any) -> None:
    c = _command(
        commands,
        "predict",
        run_predict,
        "What the theory says of a pair on a real unembedding matrix, before any training: can it displace at all\n"
        "(r_max), above which ratio of rates (kappa*), how deep, and who gains.",
        "displacement predict embeddings.npz --preferred maybe --dispreferred perhaps --kappa inf",
    )
    _file_arguments(c)
    c.add_argument("--preferred", required=True, help="token y+")
    c.add_argument("--dispreferred", required=True, help="token y-")
    c.add_argument("--hidden", help=".npy file with the hidden vector (d,) of the prompt")
    c.add_argument(
        "--start",
        metavar="TOKEN=LOG_ODDS,...",
        help="the start instead: TOKEN=LOG_ODDS,... against the average token (nats); the shortest hidden vector with "
        "these is used. Default: y+ at probability 0.7 and y- at a tenth of it",
    )
    _loss_arguments(c)
    c.add_argument(
        "--kappa",
        type=float,
        default=1.0,
        help="eta_h / eta_W: how fast h moves against W; 0 freezes h, inf freezes W (%(default)s)",
    )
    c.add_argument("--top", type=int, default=10, help="tokens to list (%(default)s)")
    c.add_argument("--figure", type=Path, metavar="FILE", help="write the figure here (.png, .svg or .pdf)")
    _json_flag(c)


def _loss_arguments(c: argparse.ArgumentParser) -> None:
    c.add_argument("--loss", default="dpo", help="name of a loss, see `displacement losses` (%(default)s)")
    c.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the loss, e.g. --set beta=0.3"
    )


def parse_assignments(texts: Sequence[str], name: str) -> dict[str, float]:
    """{"beta": 0.3} from ["beta=0.3"]; a ValueError names the text that does not parse."""
    out: dict[str, float] = {}
    for text in texts:
        key, equals, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = None
        if not equals or not key or number is None:
            raise ValueError(f"{name} must look like NAME=NUMBER, got {text!r}")
        if key in out:
            raise ValueError(f"{name} gives {key!r} twice")
        out[key] = number
    return out


def run_predict(arguments: argparse.Namespace) -> int:
    import numpy as np

    from sims.embeddings import read_embeddings
    from sims.predict import predict
    from theory.losses import get

    if not arguments.kappa >= 0:
        raise ValueError(f"--kappa must be in [0, inf], got {arguments.kappa:g}")
    if arguments.figure and arguments.figure.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--figure must end in .png, .svg or .pdf, got {str(arguments.figure)!r}")
    eta_W, eta_h = (0.0, 1.0) if arguments.kappa == float("inf") else (1.0, arguments.kappa)
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
    _show(prediction, arguments.json)
    if arguments.figure:
        from sims.plots import save_prediction

        save_prediction(prediction.flow, prediction.displacement, arguments.figure)
        print(f"figure written to {arguments.figure}", file=sys.stderr)
    return EXIT_OK


def _scan(commands: Any) -> None:
    c = _command(
        commands,
        "scan",
        run_scan,
        "The pairs most prone to displacement among given or frequent tokens. Ranks ordered pairs by r_max: above 1\n"
        "some prompt and some ratio of rates make y+ fall from the start of training; at most 1 none does.",
        "displacement scan embeddings.npz --tokens yes,no,never,always,maybe,perhaps",
    )
    _file_arguments(c)
    c.add_argument("--tokens", help="comma-separated tokens whose ordered pairs are tried")
    c.add_argument(
        "--candidates", type=int, default=200, help="without --tokens: that many frequent words (%(default)s)"
    )
    c.add_argument("--top", type=int, default=20, help="pairs to list (%(default)s)")
    _json_flag(c)


def run_scan(arguments: argparse.Namespace) -> int:
    from sims.embeddings import read_embeddings
    from sims.scan import scan

    embeddings = read_embeddings(arguments.file, tensor=arguments.tensor, tokens_path=arguments.tokens_file)
    tokens = arguments.tokens.split(",") if arguments.tokens else None
    _show(
        scan(embeddings, tokens, top=arguments.top, candidates=arguments.candidates, progress=sys.stderr.isatty()),
        arguments.json,
    )
    return EXIT_OK


# ---- losses


def _losses(commands: Any) -> None:
    c = _command(
        commands,
        "losses",
        run_losses,
        "The registry of losses as a table: name, parameters with their domains, formula, claims, source.",
        "displacement losses --json",
    )
    _json_flag(c)


def run_losses(arguments: argparse.Namespace) -> int:
    import dataclasses

    from sims.files import to_json
    from theory.losses import LOSSES, MarginLoss

    rows = []
    for name, cls in LOSSES.items():
        loss: Any = cls()
        rows.append(
            {
                "name": name,
                "parameters": {f.name: f"{f.default:g} in {f.metadata['domain']}" for f in dataclasses.fields(loss)},
                "latex": loss.latex(),
                "claims": dataclasses.asdict(loss.claims),
                "minimiser_at_u_ref_0": loss.minimiser(0.0) if isinstance(loss, MarginLoss) else None,
                "summary": (cls.__doc__ or "").strip().splitlines()[0],
                "reference": cls.reference,
            }
        )
    if arguments.json:
        print(to_json(rows), end="")
        return EXIT_OK
    for row in rows:
        claims = ", ".join(("" if held else "not ") + c.replace("_", "-") for c, held in row["claims"].items())
        print(f"{row['name']}\n    {row['summary']}")
        print("    parameters  " + (", ".join(f"{p} = {v}" for p, v in row["parameters"].items()) or "none"))
        print(f"    claims      {claims}\n    source      {row['reference']}")
    return EXIT_OK


# ---- certify


def _certify(commands: Any) -> None:
    c = _command(
        commands,
        "certify",
        run_certify,
        "Prove that displacement happens, by ball arithmetic. Without a file: the No/Never/Yes scenario.\n"
        "With one: your pair. The result is a theorem about exactly these numbers, and about a box around them.\n"
        "Exit code 0: certified, 1: not certified, 2: the input was wrong.",
        "displacement certify embeddings.npz --preferred maybe --dispreferred perhaps --kappa inf --box 1e-5",
    )
    _file_arguments(c, optional=True)  # nargs="?" for the file
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
    _json_flag(c)


def run_certify(arguments: argparse.Namespace) -> int:
    import numpy as np

    from sims.certificate import certify
    from sims.embeddings import read_embeddings
    from theory.losses import get

    rates: dict[str, Any] = {}
    if arguments.kappa is not None:
        if not arguments.kappa >= 0:
            raise ValueError(f"--kappa must be in [0, inf], got {arguments.kappa:g}")
        eta_W, eta_h = (0.0, 1.0) if arguments.kappa == float("inf") else (1.0, arguments.kappa)
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
    _show(certificate, arguments.json)
    return EXIT_OK if certificate.certified else EXIT_FAILED


# ---- verify


def _verify(commands: Any) -> None:
    c = _command(
        commands,
        "verify",
        run_verify,
        "Try every claim of the theory on random problems. Formulas are compared with differentiation, integrated\n"
        "flows (float64 and 50 digits) and training, which know none of them; deliberately wrong copies and dropped\n"
        "hypotheses must be caught; proofs must reduce to zero. Prints and saves the ledger; exit code 1 on a failure.",
        "displacement verify --instances 1000000 --out my-ledger",
    )
    c.add_argument(
        "--instances",
        type=int,
        default=100_000,
        help="per claim about one-token responses; a tenth of it for sequences (%(default)s)",
    )
    c.add_argument("--theorem", action="append", metavar="NAME", help="only this claim (may be repeated)")
    c.add_argument("--loss", action="append", metavar="NAME", help="draw only this loss (may be repeated)")
    c.add_argument("--seed", type=int, default=0, help="seed of the random problems (%(default)s)")
    c.add_argument("--workers", type=int, help="processes (one per core)")
    c.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("displacement-ledger"),
        help="for ledger.md and ledger.json (%(default)s)",
    )
    _json_flag(c)


def run_verify(arguments: argparse.Namespace) -> int:
    from sims.files import to_json, write_atomically
    from sims.verify import verify

    ledger = verify(
        arguments.theorem,
        arguments.instances,
        arguments.loss,
        arguments.seed,
        workers=arguments.workers,
        progress=sys.stderr.isatty(),
    )
    _show(ledger, arguments.json)
    write_atomically(arguments.out / "ledger.json", to_json({"version": __version__, **ledger.to_dict()}))
    write_atomically(arguments.out / "ledger.md", ledger.markdown())
    if not arguments.json:
        print(f"written to {arguments.out}/: ledger.md and ledger.json")
    return EXIT_OK if ledger.ok else EXIT_FAILED


# ---- bench


def _bench(commands: Any) -> None:
    c = _command(
        commands,
        "bench",
        run_bench,
        "Time the exact solution against its rivals, side by side in one run. Prints a table of ratios: ODE solvers\n"
        "on all parameters, on the moving ones, on the margin alone; dense and sparse training at language-model size.",
        "displacement bench --quick",
    )
    c.add_argument("--quick", action="store_true", help="small sizes, about 20 s")
    c.add_argument("--no-large", action="store_true", help="leave out the language-model size (needs 8 GB of memory)")
    _json_flag(c)


def run_bench(arguments: argparse.Namespace) -> int:
    from sims.bench import bench

    _show(bench(quick=arguments.quick, large=not arguments.no_large, progress=sys.stderr.isatty()), arguments.json)
    return EXIT_OK
