"""Before any training: will the log-probability of the preferred response fall, who gains, and how far that holds.

The network's first step on the pair is measured (`step`), the theory continues it with the network's own W, h
and features (`paths`), and the network taken straight along that step is measured again: the forecast is good
as far as the rates found there are the forecast's. Responses of several tokens have no closed path: their first rates
(Theorem 7, in a network) are continued straight on, and checked in the same way.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from sims.language.model import LanguageModel
from sims.language.outlook.check import Theory, checked, error_of
from sims.language.outlook.paths import Local, local
from sims.language.outlook.record import Checked, Falls, Foretold, Gainer, Outlook
from sims.language.outlook.step import OPTIMIZERS, FirstStep, Network, first_step
from sims.language.outlook.texts import Question, shared, spelt
from theory._check import POSITIVE, check_count, check_number, unknown
from theory.losses import Loss, get

Array = NDArray[np.float64]
POINTS = 101  # of a path
EXACT = 0.01  # a difference that needs no word
VISIBLE = 1e-3  # nats: a fall less deep is none


def outlook(
    model: LanguageModel,
    question: Question,
    *,
    optimizer: str = "sgd",
    trained: str = "both",
    loss: Loss | None = None,
    margin: float = 10.0,
    top: int = 8,
    source: str = "",
    progress: bool = False,
) -> Outlook:
    """What training on a pair will do, from the network at its start.

    Parameters
    ----------
    model : with weights in float32 or float64. It is left alone; memory for about five copies of it is needed.
    question : the prompt, the pair and the candidates (`texts.ask`).
    optimizer : "sgd", or "sign": the first steps of RMSprop and Adam.
    trained : "both", "body" or "head".
    loss : any loss of the margin; the paths do not depend on it, where they end does. Default: DPO with beta = 0.1.
    margin : nats of margin to look ahead. top : tokens to list.

    Raises ValueError for half precision, arguments out of their domains, a loss that does not raise the margin, or a
    pair that no step tells apart.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", optimizer, OPTIMIZERS))
    check_number(margin, "margin", POSITIVE)
    check_count(top, "top")
    if model.W.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"model must have float32 or float64 weights, small steps are lost in {model.W.dtype}")
    q, loss, network = question, loss or get("dpo", beta=0.1), Network(model, trained)
    by_response = network.responses(q.prompt, q.responses)
    plus, minus = (y[0] for y in q.responses[:2]) if q.single else (0, 1)
    ask = network.next_token(q.prompt) if q.single else by_response
    first = first_step(network, ask, plus, minus, optimizer)
    if not sum(first.speeds) > 0:
        raise ValueError(
            f"preferred and dispreferred must be told apart by a step, {q.texts[:2]} are not (or it is NaN)"
        )
    ours = local(network, q.prompt, plus, minus, optimizer) if q.single else None
    names = ("kernel" if optimizer == "sgd" else "line", "unconstrained") if ours else ("rates",)
    theories = [Theory(name, loss, first, ours) for name in names]
    end = margin if ours is None else min(margin, _stop(ours, loss, first))
    weigh = np.exp if q.single else np.ones_like
    gains = np.argsort(-weigh(first.values) * first.rates, kind="stable").tolist()
    others = [z for z in gains if z not in (plus, minus) and first.rates[z] > 0][:top]
    told = tuple(_foretold(t, end, others) for t in theories)
    found = checked(network, ask, optimizer, theories[0], weigh, end, others, progress)
    falls, falls_at = _falls(told[0], found, first)
    deviation = None if ours is None else error_of(theories[0].rates(first.margin), first.rates, weigh(first.values))
    body, head = first.speeds
    critical = theories[0].critical
    several = first
    if ours is not None and len(q.responses) > 2:
        several = first_step(network, by_response, 0, 1, optimizer)
    responses = _responses(q, several) if several is not first or ours is None else ()
    tokens = _tokens(model, q, first, theories[1], others) if ours else ()
    return Outlook(
        source=source or repr(model),
        prompt=q.text,
        preferred=q.texts[0],
        dispreferred=q.texts[1],
        optimizer=optimizer,
        trained=trained,
        loss=repr(loss),
        single=q.single,
        falls=falls,
        falls_at=falls_at,
        margin=first.margin,
        body_share=body / (body + head),
        critical_share=critical * body / (critical * body + head) if np.isfinite(critical) else None,
        kappa=None if ours is None else ours.kappa,
        kappa_star=None if ours is None else _times(critical, ours.kappa),
        kappa_star_unconstrained=None if ours is None else _times(theories[1].critical, ours.kappa),
        r_max=None if ours is None else float(ours.flow("unconstrained", loss).r_max),
        pair=(tokens or responses)[:2],  # type: ignore[arg-type]
        tokens=tokens,
        responses=tuple(sorted(responses, key=lambda g: -g.rate)),
        forecasts=told,
        checked=found,
        deviation=deviation,
        notes=(*q.notes, *_approximate(network, q, first, ours, deviation)),
    )


def _times(multiple: float, kappa: float) -> float:
    """kappa* : inf where none makes it fall, 0 where the body alone does."""
    return np.inf if np.isinf(multiple) else 0.0 if not multiple else multiple * kappa


def _stop(model: Local, loss: Loss, first: FirstStep) -> float:
    """Nats of margin until the loss stops raising it."""
    flow = model.flow("unconstrained", loss)
    if flow.direction < 1:
        raise ValueError(f"loss must raise the margin from where training starts, {loss!r} does not")
    return flow.stop_margin - first.margin


def _foretold(theory: Theory, end: float, others: list[int]) -> Foretold:
    """The path up to `end` nats of margin gained."""
    first = theory.first
    gained = np.linspace(0.0, end, POINTS)
    path = theory.path(first.margin + gained)
    path = path[np.isfinite(path[:, first.plus])]
    gained = gained[: len(path)]  # a path that ends never begins again
    change = path[:, first.plus] - path[0, first.plus]
    low = int(change.argmin())
    return Foretold(
        theory=theory.name,
        lowest=float(change[low]),
        lowest_at=float(gained[low]),
        gained=tuple(gained.tolist()),
        preferred=tuple(path[:, first.plus].tolist()),
        dispreferred=tuple(path[:, first.minus].tolist()),
        others=tuple(tuple(path[:, z].tolist()) for z in others),
    )


def _falls(told: Foretold, found: Checked, first: FirstStep) -> tuple[Falls, float | None]:
    """Whether and from where ln pi(y+) is below its start: forecast, or measured where the forecast holds."""
    if first.rates[first.plus] < 0:
        return "at once", 0.0
    changes = [(g, v - told.preferred[0]) for g, v in zip(told.gained, told.preferred, strict=True) if g <= found.reach]
    changes += [(p.gained, p.preferred) for p in found.points if p.agrees]
    below = [g for g, change in changes if change < -VISIBLE]
    return ("later", min(below)) if below else ("no", None)


def _responses(q: Question, first: FirstStep) -> tuple[Gainer, ...]:
    return tuple(
        Gainer(
            text=q.texts[i],
            ids=y,
            role=q.roles[i],
            shared=(shared(y, q.responses[0]), shared(y, q.responses[1])),
            unconstrained=None,
            **first.of(i),
        )
        for i, y in enumerate(q.responses)
    )


def _tokens(model: LanguageModel, q: Question, first: FirstStep, free: Theory, others: list[int]) -> tuple[Gainer, ...]:
    unconstrained = free.rates(first.margin)
    named = [(first.plus, q.texts[0], "y+"), (first.minus, q.texts[1], "y-")]
    return tuple(
        Gainer(
            text=text,
            ids=(z,),
            role=role,
            shared=(int(role == "y+"), int(role == "y-")),
            unconstrained=float(unconstrained[z]),
            **first.of(z),
        )
        for z, text, role in [*named, *((z, spelt(model, z), "") for z in others)]
    )


def _approximate(
    network: Network, q: Question, first: FirstStep, ours: Local | None, deviation: float | None
) -> list[str]:
    """Where the theory, or what is measured, is not the network."""
    notes = []
    own = network.next_token(q.prompt)(network.weights).detach().cpu().numpy()
    rows = torch.tensor([list(q.prompt)], device=network.device)
    with torch.no_grad():
        said = torch.log_softmax(network.model.network(input_ids=rows, use_cache=False).logits[0, -1].double(), -1)
    if (gap := float(abs(said.cpu().numpy() - own).max())) > EXACT:
        notes.append(
            f"the network does more between its last state and its logits than is known here: its own ln pi differ by "
            f"up to {gap:.2g} nats from those measured, and everything below is approximate."
        )
    if ours is None or deviation is None:
        return notes
    config = network.model.network.config
    if cap := getattr(config, "final_logit_softcapping", None):
        notes.append(f"logits are softly capped at {cap:g}; the theory takes the cap's slopes at the start for good.")
    if network.tied:
        notes.append("embedding and unembedding are one matrix; the theory takes them for two that move apart.")
    if deviation > EXACT:
        notes.append(
            f"the theory's first rates differ by {100 * deviation:.2g} % from those measured, which are the ones shown."
        )
    return notes
