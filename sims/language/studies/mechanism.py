"""Why the probability of a preferred token falls in a network, and what foretells it (Section 3, with the controls).

Every run trains one prompt's pair of single tokens, No over Never after SFT: one part of the network by one optimiser.
Its course (`sims.language.studies.courses`) is laid beside the closed forms at equal margin (`sims.language.forecast`).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from sims.language.forecast import Course, forecast, rates
from sims.language.jobs import run_jobs
from sims.language.kernel import final_gain, stream
from sims.language.loss_json import loss_of, plain_loss
from sims.language.model import LanguageModel, load, load_unchanged
from sims.language.probing import pairs_of_samples, probed
from sims.language.responses import Ids
from sims.language.studies.courses import Stepper, courses, moments_of
from sims.language.studies.mechanism_record import Mechanism
from sims.language.studies.persona import chosen_prompts, fine_tuned, world_of
from sims.language.worlds.persona import HABITS, PEOPLE
from theory._check import check_count
from theory.displacement import alignment_ratio
from theory.losses import Loss, get

Array = NDArray[np.float64]
RESULT = Mechanism  # what reads a saved result

PREFERRED, DISPREFERRED, RIVAL = "No", "Never", "Yes"
LOSS = get("dpo", beta=0.1)
STEPS = 100
GRID = {  # learning rates of every optimiser
    "sgd": (0.01, 0.03),
    "sign": (1e-5, 3e-5),
    "rmsprop": (1e-5, 3e-5),
    "adam": (3e-5, 1e-4),
}
# What is laid beside the theories.
FOREKNOWN = (("body", "sgd", 0.03), ("both", "rmsprop", 1e-5), ("both", "adam", 1e-4))
GAINED = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0, 10.0, 11.0, 12.0)  # nats of margin
PIECES = (1, 2, 4, 8, 16)
ON_DIAGRAM = (0, 5, 15, 40, 80)  # steps at which the runs of the grid are looked at
# One small step on every ordered pair of these words: who falls at once?
FIRST_WORDS = ("No", "Never", "Maybe", "Always", "Yes", "Sure")
FIRST_STEPS = (("body", "sgd", 1e-3), ("both", "sgd", 1e-3), ("body", "sign", 1e-6), ("both", "sign", 1e-6))
RESPONSES = 12  # different answers of several tokens per question


def outcome(
    course: Course, log_pi: Array, losses: Array, at: Sequence[int], rival: int, by_sign: bool
) -> dict[str, Any]:
    """What became of one run, what its first step was expected to do, and where it was on the phase diagram."""
    ln = log_pi[:, course.plus]
    p, u = np.exp(ln), ln - log_pi[:, course.minus]
    first = {}
    for theory, name in (("kernel", "measured_kernel"), ("unconstrained", "unconstrained")):
        through_body, through_head, _, _ = rates(course, 0, theory, by_sign)
        first[name] = float((through_body + through_head)[course.plus])
    points = []
    for k, t in enumerate(at[:-1]):
        if u[t + 1] == u[t]:  # a margin that has stopped has no slope
            continue
        through_body, through_head, body, head = rates(course, k, "kernel", by_sign)
        pull = -float(through_body[course.plus]) / body if body else 0.0
        lift = (1 - p[t] + np.exp(log_pi[t, course.minus])) / 2  # rise of ln pi(y+) per nat through the head
        share = body / (body + head)
        points.append([share, pull / lift, float((ln[t + 1] - ln[t]) / (u[t + 1] - u[t])) / lift])
    return {
        "start": float(p[0]),
        "peak": float(p.max()),
        "final": float(p[-1]),
        "drop": float((np.maximum.accumulate(p) - p).max()),
        "change": float(ln[-1] - ln[0]),
        "rival": [float(np.exp(log_pi[t, rival])) for t in (0, -1)],
        "gained": float(u[-1] - u[0]),
        "rose": bool((np.diff(losses) > 0).any()),
        "share": [float(course.share(by_sign)[k]) for k in (0, -1)],
        "r_max": _r_max(course, by_sign),
        "first": first | {"happened": float(ln[1] - ln[0])},
        "points": points,
    }


def _r_max(course: Course, by_sign: bool) -> list[float | None]:
    """r_max (exact_solution E4) of a, of how the body moves h at the start, and the largest of that at any moment."""
    steps = [course.a[0], *course.body[:, 2 if by_sign else 0]]
    found = []
    for t, step in enumerate(steps):
        point = course.at(max(t - 1, 0))
        size = float(point.a @ step)
        along = point.W @ step
        found.append(alignment_ratio(along, size, point.plus, point.minus) if size > 0 else None)
    return [found[0], found[1], None if found[1] is None else max(found[1:])]


def theories(by_sign: bool, body_only: bool) -> dict[str, dict[str, Any]]:
    """The forecasts that are compared: label -> arguments of `forecast`, `pieces` for knots."""
    own = "line" if by_sign else "kernel"
    found: dict[str, dict[str, Any]] = {"unconstrained": {"theory": "unconstrained"}, "sphere": {"theory": "sphere"}}
    if by_sign:
        found["gradient kernel"] = {"theory": "kernel"}
    for n in PIECES:
        found[f"{own} x {n}"] = {"theory": own, "pieces": n}
    if not by_sign:
        found["stream"] = {"theory": "stream"}
    if not body_only:
        for held in ("direction", "share"):
            found[f"{own} x {PIECES[-1]}, {held} held"] = {"theory": own, "pieces": PIECES[-1], "held": held}
    return found


def compared(course: Course, rival: int, by_sign: bool) -> dict[str, Any]:
    """Every theory against one run, where its margin has grown by each of GAINED and at its end.

    Per theory and place: Spearman correlation over all tokens but the pair, forecast change of ln pi of y+ and of the
    rival (None where the theory says that the margin is out of reach); per place how the features have moved.
    """
    moments = [*(int(t) for t in course.reaches(GAINED)), len(course.h) - 1]
    use = [t for t in moments if t > 0]
    others = np.delete(np.arange(len(course.W)), [course.plus, course.minus])
    change = course.log_pi - course.log_pi[0]

    def placed(values: Sequence[Any]) -> list[Any]:
        rest = iter(values)
        return [next(rest) if t > 0 else None for t in moments]

    found = {}
    for label, how in theories(by_sign, not course.head.any()).items():
        if course.gain is None and how["theory"] in ("sphere", "stream"):
            continue
        knots = course.knots(how.get("pieces", 1))
        log_pi = forecast(course, how["theory"], use, signs=by_sign, knots=knots, held=how.get("held", ""))
        rows = []
        for t, d in zip(use, log_pi - course.log_pi[0], strict=True):
            rank = float(spearmanr(d[others], change[t, others]).statistic)  # type: ignore[union-attr]
            rows.append([rank, float(d[course.plus]), float(d[rival])] if np.isfinite(d).all() else None)
        found[label] = placed(rows)
    step = course.body[:, 2 if by_sign else 0]
    motion = []
    for t in use:
        dh = course.h[t] - course.h[0]
        moved = [np.log(np.exp(W @ h).sum()) for W, h in ((course.W, course.h[t]), (course.at(t).W, course.h[0]))]
        own = [course.w[0, 0] @ course.h[t] - moved[0], course.w[t, 0] @ course.h[0] - moved[1]]
        size = np.linalg.norm(step[t]) / np.linalg.norm(step[0])
        angles = [_cosine(dh, course.a[0]), _cosine(dh, step[0]), _cosine(step[t], step[0])]
        motion.append([*angles, float(size), *(float(x - course.log_pi[0, course.plus]) for x in own)])
    end = float(course.margin[-1] - course.margin[0])
    happened = [[float(change[t, z]) for z in (course.plus, rival)] for t in use]
    return {"happened": placed(happened), "motion": placed(motion), "theories": found, "end": end}


def _cosine(x: Array, y: Array) -> float:
    return float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-300))


def mechanism(
    models: Sequence[str | Path],
    loss: Loss = LOSS,
    *,
    sft_seeds: Sequence[int] = (0,),
    prompts: int = 10,
    forecast_prompts: int = 30,
    steps: int = STEPS,
    grid: Mapping[str, Sequence[float]] = GRID,
    foreknown: Sequence[tuple[str, str, float]] = FOREKNOWN,
    first_words: Sequence[str] = FIRST_WORDS,
    folder: Path | None = None,
    workers: int | None = None,
) -> Mechanism:
    """Every base model after SFT by every seed: head, body and both trained by every optimiser and rate of the grid, on
    `prompts` prompts; those of `foreknown` on `forecast_prompts`, laid beside the theories; one
    small step on every ordered pair of `first_words`.

    models : folders of base models of the persona world. folder : where finished parts are kept; a killed run resumes.
    """
    for value, name in ((prompts, "prompts"), (forecast_prompts, "forecast_prompts"), (steps, "steps")):
        check_count(value, name)
    common = {"steps": steps, "loss": plain_loss(loss)}
    bases = [{"model": str(path), "fingerprint": load(path).fingerprint} for path in models]
    places = [(where, sft) for where in bases for sft in sft_seeds]
    jobs = []
    for where, sft in places:
        for trained in ("head", "body", "both"):
            cases = [[trained, name, lr] for name, lrs in grid.items() for lr in lrs]
            jobs.append({**where, "sft": sft, "cases": cases, "prompts": prompts, "beside": False, **common})
        for case in foreknown:
            extra = {"cases": [list(case)], "prompts": forecast_prompts, "beside": True}
            jobs.append({**where, "sft": sft, **extra, **common})
    found = run_jobs(_job, jobs, folder, workers, label="mechanism")
    cases = [list(case) for case in foreknown]
    several = [{**where, "cases": cases, "prompts": prompts, **common} for where in bases]
    probes = run_jobs(_probe_job, several, folder, workers, label="responses")
    runs = [r for part, job in zip(found, jobs, strict=True) if not job["beside"] for r in part]
    beside = [r for part, job in zip(found, jobs, strict=True) if job["beside"] for r in part]
    beside += [r for part in probes for r in part]
    at_once = [
        {**where, "sft": sft, "words": list(first_words), "prompts": prompts, "loss": common["loss"]}
        for where, sft in places
    ]
    steps_found = run_jobs(_first_job, at_once, folder, workers, label="first steps")
    words = {"preferred": PREFERRED, "dispreferred": DISPREFERRED, "rival": RIVAL}
    asked = {"models": len(models), "sft_seeds": list(sft_seeds), "prompts": prompts}
    asked["forecast_prompts"] = forecast_prompts
    return Mechanism.of(runs, beside, steps_found, {**common, **words, **asked, "gained": list(GAINED)})


def _asked(model: str, fingerprint: str, sft: int, prompts: int) -> tuple[LanguageModel, list[Ids]]:
    """A base model after SFT, and prompts whose statements have the trait."""
    base = load_unchanged(model, fingerprint)
    world, seed = world_of(base), int(base.training.get("recipe", {}).get("seed", 0))
    lm = fine_tuned(base, world, sft)
    return lm, [lm.prompt(p) for p in chosen_prompts(world, PREFERRED, prompts, (seed, sft))]


def _job(
    model: str,
    fingerprint: str,
    sft: int,
    cases: Sequence[tuple[str, str, float]],
    prompts: int,
    beside: bool,
    steps: int,
    loss: dict[str, Any],
) -> list[dict[str, Any]]:
    """One model after SFT: a record per case, with a list over its prompts."""
    lm, asked = _asked(model, fingerprint, sft, prompts)
    plus, minus, rival = (lm.token(w) for w in (PREFERRED, DISPREFERRED, RIVAL))
    at = moments_of(steps, 3) if beside else sorted({t for t in ON_DIAGRAM if t < steps} | {steps})
    streams: list[Any] = [None] * prompts
    if beside and any(name == "sgd" for _, name, _ in cases) and final_gain(lm) is not None:
        streams = [stream(lm, x) for x in asked]
    out = []
    for trained, name, lr in cases:
        stepper = Stepper(name, lr)
        found = courses(lm, asked, plus, minus, loss_of(loss), stepper, steps, trained, at)
        record: dict[str, Any] = {"what": "tokens", "trained": trained, "optimizer": name, "lr": lr, "runs": []}
        for course, log_pi, losses, x in zip(*found, streams, strict=True):
            if beside:
                record["runs"].append(compared(replace(course, stream=x), rival, stepper.signs))
            else:
                record["runs"].append(outcome(course, log_pi, losses, at, rival, stepper.signs))
        out.append(record)
    return out


def _probe_job(
    model: str,
    fingerprint: str,
    cases: Sequence[tuple[str, str, float]],
    prompts: int,
    steps: int,
    loss: dict[str, Any],
) -> list[dict[str, Any]]:
    """One base model: pairs of its own answers, of several tokens, to questions about facts; probes beside training."""
    lm = load_unchanged(model, fingerprint)
    rng = np.random.default_rng(int(lm.training.get("recipe", {}).get("seed", 0)))
    facts = rng.permutation([(p, h) for p in PEOPLE for h in HABITS])[: 2 * prompts]
    asked = [lm.prompt(f"Does {person} {habit} ?") for person, habit in facts]
    pairs, responses = pairs_of_samples(lm, asked, prompts, RESPONSES, 12, seed=0)
    out = []
    for trained, name, lr in cases:
        how = (loss_of(loss), Stepper(name, lr), steps, trained, moments_of(steps, 5), GAINED, PIECES)
        runs = probed(lm, pairs, responses, *how)
        out.append({"what": "responses", "trained": trained, "optimizer": name, "lr": lr, "runs": runs})
    return out


def _first_job(
    model: str, fingerprint: str, sft: int, words: Sequence[str], prompts: int, loss: dict[str, Any]
) -> dict[str, list[list[float]]]:
    """One small step on every ordered pair of the words: change of ln pi(y+), foretold by the kernel, and without."""
    lm, asked = _asked(model, fingerprint, sft, prompts)
    out: dict[str, list[list[float]]] = {}
    for trained, name, lr in FIRST_STEPS:
        stepper = Stepper(name, lr)
        rows = out.setdefault(f"{trained} {name}", [])
        for plus, minus in itertools.permutations(map(lm.token, words), 2):
            found, log_pi, _ = courses(lm, asked, plus, minus, loss_of(loss), stepper, 1, trained, [0])
            for course, ln in zip(found, log_pi[:, :, plus], strict=True):
                told = (rates(course, 0, theory, stepper.signs) for theory in ("kernel", "unconstrained"))
                rows.append([float(ln[1] - ln[0]), *(float((body + head)[plus]) for body, head, _, _ in told)])
    return out
