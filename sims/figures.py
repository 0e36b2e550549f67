"""The figures of the No/Never/Yes study apart from their drawing: the data of all of them in one record, and files."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sims.files import to_json, write_atomically
from sims.scenarios.curves import Gains, LossMarks, Story, Table, gains, loss_marks, story
from sims.scenarios.no_never_yes import BETA, KAPPA, TOKENS, NoNeverYes, model
from sims.scenarios.phase import PhaseDiagram, SimplexField, phase_diagram, simplex_field, simplex_path
from theory import Displacement, ExactFlow, __version__
from theory.losses import Loss, get

Array = NDArray[np.float64]

# The phase diagram's axes: ratios around the scenario's, alignments from orthogonal to nearly parallel.
RATIOS = np.logspace(-2, 2, 60)
COSINES = np.linspace(0.0, 0.98, 60)

CAPTIONS = {
    "log_probs": "ln pi of every token along the exact gradient flow (lines), integrated numerically (circles) and by "
    "gradient descent (crosses), over time and over the margin.",
    "simplex": "Probabilities of No, Never and Yes renormalised among the three. Arrows: the instantaneous flow if W "
    "stays as it is at the moment named and the hidden vector is moved to the point of the simplex; W moves on, so the "
    "path follows them only at the dot.",
    "phase": "Depth of displacement over kappa and the alignment of No and Never. W_Never is turned in the plane of "
    "W_No and W_Never at fixed length; the hidden vector stays, so pi(Never) at the start grows to the right.",
    "gains": "Who gains: predicted by <W_z, W_No - W_Never> before training, and what happens.",
    "losses": "Every margin loss walks the same path over the margin; each stops where its slope vanishes.",
}


@dataclass(frozen=True)
class Moment:
    """The simplex at one moment of the flow."""

    title: str
    field: SimplexField
    walked: Array  # (T, 3) the path up to this moment
    ahead: Array  # (T', 3) the path from here on


@dataclass(frozen=True)
class FigureData:
    """What the figures show; names as in CAPTIONS."""

    log_probs: Story
    simplex: tuple[Moment, ...]
    phase: PhaseDiagram
    gains: Gains
    losses: LossMarks

    def tables(self) -> dict[str, Table]:
        """The data behind each figure as columns, by file name without suffix."""
        fields = [m.field.table() for m in self.simplex]
        first = self.simplex[0]
        path = first.ahead  # all of it: it begins at the start
        return {
            "log_probs": self.log_probs.table(),
            "simplex_field": {key: [v for f in fields for v in f[key]] for key in fields[0]},
            "simplex_path": {f"p({n})": list(path[:, i]) for i, n in enumerate(first.field.names)},
            "phase": self.phase.table(),
            "phase_curves": self.phase.curve_table(),
            "gains": self.gains.table(),
            "losses": self.losses.table(),
            "losses_path": self.losses.path_table(),
        }


def figure_data(study: NoNeverYes, loss: Loss | None = None) -> FigureData:
    """Everything the figures show. `loss` must be the one the study was run with; default: its default."""
    loss = get("dpo", beta=BETA) if loss is None else loss
    if repr(loss) != study.parameters["loss"]:
        raise ValueError(f"loss must be the study's, {study.parameters['loss']}, got {loss!r}")
    m = model()
    flow = ExactFlow(m, loss, 1.0, KAPPA)
    return FigureData(
        log_probs=story(flow, study.main, study.curves[1:]),
        simplex=simplex_moments(flow, study.main, [TOKENS.index(t) for t in ("No", "Never", "Yes")]),
        phase=phase_diagram(m, RATIOS, COSINES, KAPPA),
        gains=gains(flow, study.main),
        losses=loss_marks(flow, study.main, study.losses),
    )


def simplex_moments(
    flow: ExactFlow, displacement: Displacement, tokens: list[int], points: int = 500
) -> tuple[Moment, ...]:
    """Field and path at the start, at the trough and where y+ is back at its start, as far as there are such points."""
    marks = {"at the start": displacement.start.margin}
    if displacement.trough.kind == "trough":
        marks["at the trough"] = displacement.trough.margin
    if displacement.last_return is not None:
        marks["back at its start"] = displacement.last_return.margin
    start, last = flow.start_margin, max(marks.values())
    far = min(start + 1.15 * max(last - start, 1.0), flow.stop_margin)
    # Every moment is a point of the path, and points are denser near the start, where the path bends.
    margins = np.unique([*marks.values(), *(start + (far - start) * np.linspace(0, 1, points) ** 2)])
    path = simplex_path(flow, tokens, margins)
    return tuple(
        Moment(
            title,
            simplex_field(flow.model_at_margin(u), flow.loss, tokens, flow.kappa),
            path[margins <= u],
            path[margins >= u],
        )
        for title, u in marks.items()
    )


def csv_text(table: Table) -> str:
    """Columns as CSV with a header; floats with all their digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table)
    columns = [[v if isinstance(v, str) else repr(float(v)) for v in column] for column in table.values()]
    writer.writerows(zip(*columns, strict=True))
    return out.getvalue()


# ---- files

FORMATS = ("png", "svg")
DPI = 200


def save_picture(figure: Any, path: Path) -> Path:
    """Write a matplotlib figure atomically, in the format that the suffix names."""
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in ("png", "svg", "pdf"):
        raise ValueError(f"path must end in .png, .svg or .pdf, got {str(path)!r}")
    out = io.BytesIO()
    dateless = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)  # equal data give equal files
    figure.savefig(out, format=suffix, dpi=DPI, metadata=dateless)
    return write_atomically(path, out.getvalue())


def save_all(drawn: dict[str, Any], data: FigureData, study: NoNeverYes, folder: Path) -> list[Path]:
    """Write figures (name -> matplotlib figure), their tables, and figures.json; returns the paths."""
    paths = []
    for name, figure in drawn.items():
        for suffix in FORMATS:
            paths.append(save_picture(figure, folder / f"{name}.{suffix}"))
            figure.set_layout_engine("none")  # laid out by the first; computing it again would take half the time
    paths += [write_atomically(folder / f"{name}.csv", csv_text(table)) for name, table in data.tables().items()]
    about = {"version": __version__, "parameters": study.parameters, "captions": CAPTIONS}
    about["files"] = [p.name for p in paths]
    return [*paths, write_atomically(folder / "figures.json", to_json(about))]
