"""Before any training: will the log-probability of the preferred response fall, who gains, and how far that holds.

The network's first step on the pair is measured (`step`), the theory continues it with the network's own W, h
and features (`paths`), and the network taken straight along that step is measured again: the forecast is good
as far as the rates found there are the forecast's. Responses of several tokens have no closed path: their first rates
(Theorem 7, in a network) are continued straight on, and checked in the same way.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sims.language.model import LanguageModel
from sims.language.outlook.check import Theory, checked, error_of
from sims.language.outlook.paths import Local, local
from sims.language.outlook.record import Checked, Foretold, Gainer, Outlook
from sims.language.outlook.step import OPTIMIZERS, FirstStep, Network, first_step
from sims.language.outlook.texts import Question, spelt
from sims.language.responses import shared
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
    check_number(margin, "margin", POSITIVE)
    check_count(top, "top")
    q, loss, network = question, loss or get("dpo", beta=0.1), _network(model, trained, optimizer)
    by_response = network.responses(q.prompt, q.responses)
    plus, minus = (y[0] for y in q.responses[:2]) if q.single else (0, 1)
    ask = network.next_token(q.prompt) if q.single else by_response
    first = first_step(network, ask, plus, minus, optimizer)
    if not sum(first.speeds) > 0:
        raise ValueError(f"preferred and dispreferred must be told apart by a step, {q.texts[:2]} are not")
    ours = local(network, q.prompt, plus, minus, optimizer) if q.single else None
    names = ("kernel" if optimizer == "sgd" else "line", "unconstrained") if ours else ("rates",)
    theories = [Theory(name, loss, first, ours) for name in names]
    end = margin if ours is None else min(margin, _stop(ours, loss, first))
    weigh = np.exp if q.single else np.ones_like
    gains = np.argsort(-weigh(first.values) * first.rates, kind="stable").tolist()
    others = [z for z in gains if z not in (plus, minus) and first.rates[z] > 0][:top]
    told = tuple(_foretold(t, end, others) for t in theories)
    found = checked(network, ask, optimizer, theories[0], weigh, end, others, progress)
    tokens = _tokens(model, q, first, theories[1], others) if ours else ()
    responses: tuple[Gainer, ...] = ()
    if ours is None or len(q.responses) > 2:
        responses = _responses(q, first_step(network, by_response, 0, 1, optimizer) if ours else first)
    asked = {"source": source or repr(model), "optimizer": optimizer, "trained": trained, "loss": repr(loss)}
    return Outlook(
        prompt=q.text,
        preferred=q.texts[0],
        dispreferred=q.texts[1],
        single=q.single,
        margin=first.margin,
        pair=(tokens or responses)[:2],  # type: ignore[arg-type]
        tokens=tokens,
        responses=tuple(sorted(responses, key=lambda g: -g.rate)),
        forecasts=told,
        checked=found,
        **asked,
        **_falls(told[0], found, first),
        **_numbers(theories, weigh),
        notes=(*q.notes, *_approximate(network, q, theories[0], weigh)),
    )


def _network(model: LanguageModel, trained: str, optimizer: str) -> Network:
    if optimizer not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", optimizer, OPTIMIZERS))
    if model.W.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"model must have float32 or float64 weights, small steps are lost in {model.W.dtype}")
    return Network(model, trained)


def _numbers(theories: list[Theory], weigh: Any) -> dict[str, Any]:
    """Shares of body and head, and what the theory knows of single tokens."""
    own, first, ours = theories[0], theories[0].first, theories[0].model
    (body, head), critical = first.speeds, own.critical
    share = None if np.isinf(critical) else critical * body / (critical * body + head) if critical else 0.0
    found: dict[str, Any] = {"body_share": body / (body + head), "critical_share": share}
    names = ("kappa", "kappa_star", "kappa_star_unconstrained", "r_max", "deviation")
    if ours is None:
        return found | dict.fromkeys(names)
    stars = (_times(t.critical, ours.kappa) for t in theories)
    r_max = float(ours.flow("unconstrained", own.loss).r_max)
    return found | dict(zip(names, (ours.kappa, *stars, r_max, _deviation(own, weigh)), strict=True))


def _deviation(theory: Theory, weigh: Any) -> float:
    """Of its first rates from those measured, as a part of their size."""
    first = theory.first
    return error_of(theory.rates(first.margin), first.rates, weigh(first.values))


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


def _falls(told: Foretold, found: Checked, first: FirstStep) -> dict[str, Any]:
    """Whether and from where ln pi(y+) is below its start: forecast, or measured where the forecast holds."""
    if first.rates[first.plus] < 0:
        return {"falls": "at once", "falls_at": 0.0}
    changes = [(g, v - told.preferred[0]) for g, v in zip(told.gained, told.preferred, strict=True) if g <= found.reach]
    changes += [(p.gained, p.preferred) for p in found.points if p.agrees]
    below = [g for g, change in changes if change < -VISIBLE]
    return {"falls": "later" if below else "no", "falls_at": min(below, default=None)}


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


def _approximate(network: Network, q: Question, theory: Theory, weigh: Any) -> list[str]:
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
    if theory.model is None:
        return notes
    config = network.model.network.config
    if cap := getattr(config, "final_logit_softcapping", None):
        notes.append(f"logits are softly capped at {cap:g}; the theory takes the cap's slopes at the start for good.")
    if network.tied:
        notes.append("embedding and unembedding are one matrix; the theory takes them for two that move apart.")
    if (deviation := _deviation(theory, weigh)) > EXACT:
        notes.append(
            f"the theory's first rates differ by {100 * deviation:.2g} % from those measured, which are the ones shown."
        )
    return notes
