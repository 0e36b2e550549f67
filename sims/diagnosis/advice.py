"""What to try after a diagnosis, with what is known of its price and where that is from."""

import math
import re
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sims.diagnosis.scale import USUAL_BETA, loss_names
from sims.diagnosis.verdict import Diagnosis
from theory.losses import SFT, Pair, get

Array = NDArray[np.float64]

WEIGHTS = (1.0, 10.0)  # 1: of TRL's documentation (IRPO); 10: the paper's, at TOKENS
TOKENS = 100  # of a chosen response, where the log does not tell
NEARLY = 0.02  # share of pairs ranked right that counts as reached
PAPER = "Razin et al. 2024, Section 6 and Table 16"

SFT_LINES = (
    'TRL: DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=[1.0, a])   # a times a mean over the batch\'s tokens',
    "LLaMA-Factory: pref_ftx: a   # a times each response's mean per token: the same for responses of one length",
    "OpenRLHF: --model.nll_loss_coef a   # as LLaMA-Factory",
    "axolotl: dpo_loss_weights, where your version has it   # as TRL",
)
EVAL_LINES = (
    "TRL, LLaMA-Factory, axolotl: eval_strategy=steps, eval_steps=<a tenth of the run>, eval_on_start=true, and as",
    "eval_dataset a fixed few hundred of the training pairs, beside held-out ones",
)


@dataclass(frozen=True)
class Advice:
    """One thing to try. lines : of a configuration or commands. source : where its numbers are from."""

    title: str
    text: str
    lines: tuple[str, ...] = ()
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.title}: {self.text}" + (f" [{self.source}]" if self.source else "")
        told = fill(text, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join([told, *(f"    {line}" for line in self.lines)])


def advise(d: Diagnosis) -> tuple[Advice, ...]:
    """What to try, most telling first; empty when nothing has to be done."""
    if d.verdict == "undecided":
        return (Advice("measure the same pairs each time", "batches of different pairs are too noisy", EVAL_LINES),)
    if d.verdict == "no displacement":
        return ()
    if d.verdict == "recovered":
        c = d.finding.chosen
        low = f" (not near {d.log.axis} {c.lowest_step:g}, where the chosen were lowest)" if c else ""
        return (Advice("let it run on", f"a checkpoint from the end is the one to keep{low}"),)
    if d.finding.diverged:
        text = "a loss or reward that is no number comes from too large a step or an overflow in half precision"
        return (Advice("lower learning_rate, clip gradients, or train in bfloat16 or float32", text),)
    earlier = stop_earlier(d)
    return (*([earlier] if earlier else []), sft_term(d), PAIRS, WHERE)


PAIRS = Advice(
    "find the pairs that cause it",
    "score the pairs, check on your own model whether the scores foretell the fall, and drop or down-weight the worst. "
    "Filtering need not stop the fall: the paper's filtered runs still lose 46 (Gemma-2B) and 28 nats (Llama-3-8B), "
    "unfiltered 59 and 48, though they refuse as they should again; on the small models shipped here CHES ranks falls "
    "with Spearman .33 to .48, the exact first-order probe with 1.00 at small steps",
    (
        "displacement score --model_name_or_path M --dataset D --output scored.jsonl",
        "displacement validate --model_name_or_path M --dataset D",
        "displacement filter scored.jsonl --by ln_ches --keep 0.95",
    ),
    f"{PAPER}; notebooks/results/percentiles.json",
)
WHERE = Advice(
    "see where the probability went",
    "a log cannot tell whether it went to better answers or to their opposite. Read samples of the model; ask before a "
    "run which tokens gain; watch candidate responses during it",
    (
        "displacement predict --model_name_or_path M --prompt 'X' --preferred 'Y' --dispreferred 'Z'",
        "callbacks=[DisplacementCallback(probe=Probe.draw(model, tokenizer, dataset))]   # sims.language.callback",
    ),
)


def stop_earlier(d: Diagnosis) -> Advice | None:
    """Where this run had ranked the pairs as well as at its end, at a smaller loss of the chosen; None if nowhere."""
    f = d.finding
    if f.chosen is None:
        return None
    table = d.log.together(f.split, "accuracy", f"{d.scale.metric}_chosen")
    m = f.chosen.window
    if not d.scale.reference or len(table) < 2 * m + 1 or not f.chosen.end < 0:
        return None
    steps, ranked, chosen = (np.convolve(x, np.ones(m) / m, mode="valid") for x in table.T)
    chosen = chosen * d.scale.factor
    i = int(np.flatnonzero(ranked >= ranked[-1] - NEARLY)[0])
    if not ranked[-1] > 0.5 or chosen[i] - f.chosen.end < 0.25 * -f.chosen.end:
        return None
    about = "about " if m > 1 else ""
    text = (
        f"{about}{d.log.axis} {steps[i]:g} already ranked {ranked[i]:.0%} of the pairs right (at the end "
        f"{ranked[-1]:.0%}) with the chosen at {chosen[i]:+.3g} instead of {f.chosen.end:+.3g} {d.scale.unit}"
    )
    return Advice("stop earlier or lower the learning rate", text, source=f"this log, {f.split}")


def sft_ratios(beta: float, margin: float, tokens: float, weights: tuple[float, ...] = WEIGHTS) -> Array:
    """d_w/d_l of DPO with an SFT term per response token: how much harder y+ is pushed up than y- down.

    margin : nats against the reference, where the ratio is asked for. weights : as TRL's `loss_weights` has them, for
    chosen responses of `tokens` tokens. A pair's ln pi(y+) rises when this is above <grad y+, grad y->/|grad y+|^2.
    """
    at = Pair(margin, 0.0, 0.0, 0.0, tokens, tokens)
    ratios = []
    for a in weights:
        up, down = SFT(get("dpo", beta=beta), a / tokens).incentives(at)
        ratios.append(float(up / down))
    return np.array(ratios)


def sft_weight(d: Diagnosis) -> float | None:
    """The weight of the SFT term that the run's settings or `loss` name; NaN where only its name is; None without."""
    settings = d.log.settings
    names = [part for name in loss_names(settings.get("loss")) for part in re.split(r"[+:]", name)]
    weights = settings.get("loss_weights")
    if "sft" in names:
        if (
            not isinstance(weights, list)
            or len(weights) != len(names)
            or names[0] == "sft"
            or not _positive(weights[0])
        ):
            return math.nan
        a = weights[names.index("sft")]
        return a / weights[0] if _positive(a) else None
    return float(settings["sft"]) if _positive(settings.get("sft")) else None


def _positive(x: Any) -> bool:
    return isinstance(x, int | float) and 0 < x < math.inf


def sft_term(d: Diagnosis) -> Advice:
    """The likelihood term of the chosen responses, as each trainer spells it, and how strong a weight is."""
    beta = d.scale.beta or USUAL_BETA
    m = d.finding.margin
    end = round(m.end, 1) if m is not None and d.scale.unit == "nats" and m.end > 0 else 0.0
    weight = sft_weight(d)
    weights, said = WEIGHTS, ""
    if weight is not None and not math.isnan(weight):
        weights, said = (weight, 10 * weight), f" (a = {weight:g})"
    shown = []
    for margin in sorted({0.0, end}):
        pairs = zip(weights, sft_ratios(beta, margin, TOKENS, weights), strict=True)
        shown.append(f"at margin {margin:g} " + ", ".join(f"{r:.3g} with a = {a:g}" for a, r in pairs))
    had = f"this run's{said} did not suffice. " if weight is not None else ""
    text = (
        f"{had}It adds a times the chosen responses' own log-likelihood. How much harder the chosen are pushed up than "
        f"the rejected down (1 without it), for DPO with beta = {beta:.3g} and {TOKENS} tokens: {'; '.join(shown)}. "
        "In the paper -59 nats became +20 (Gemma-2B) and -48 became +29 (Llama-3-8B); users report cures and worse "
        "models (huggingface/trl #800), so watch margin and accuracy beside it"
    )
    title = "add an SFT term" if weight is None else "raise the weight of the SFT term"
    compare = f"displacement validate --model_name_or_path M --dataset D --loss dpo:beta={beta:.3g}"
    lines = (
        *SFT_LINES,
        "on your own pairs, what all of them together do under each loss (sft: a / n, on the sum of n tokens):",
        f"{compare} --out without-sft",
        f"{compare}+sft:0.1",
    )
    return Advice(title, text, lines, f"theory.losses.SFT; {PAPER}")
