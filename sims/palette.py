"""Colours, type sizes and labels that all figures share.

Colours are those of Okabe and Ito, told apart by colour-blind readers. A word has the same one in every figure of
curves; bars of gains are coloured by the token's role to the pair, where y+ and y- have the colours of No and Never.
"""

from typing import Any

from sims.scenarios.curves import AFFIRMATIONS, DENIALS, Role

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()
)
LOG_LABEL = r"$\ln\,\pi$  (nats)"
MARGIN_LABEL = r"margin $u=\ln\,\pi(y^+)-\ln\,\pi(y^-)$  (nats)"
GREY, FAINT = "#8C8C8C", "#D0D0D0"
WORD_COLORS = {"No": BLUE, "Never": GREEN, "Yes": RED}
ROLE_COLORS: dict[Role, str] = {
    "preferred": BLUE,
    "dispreferred": GREEN,
    "benign": SKY,
    "catastrophic": RED,
    "neutral": GREY,
}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans",
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "white",
    "svg.hashsalt": "likelihood-displacement",
}


def shown(name: str) -> str:
    """A token as a label: spaces made visible, nothing read as mathematics."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name).replace(" ", "\N{OPEN BOX}")
    return text.replace("$", r"\$") or "\N{EMPTY SET}"


def token_color(name: str) -> str:
    """The word's own colour, its family's for spellings, grey for the rest."""
    if name in WORD_COLORS:
        return WORD_COLORS[name]
    return SKY if name in DENIALS else ORANGE if name in AFFIRMATIONS else GREY


def signed(x: float) -> str:
    """A number with its sign, minus as a minus."""
    return f"{x:+.1f}".replace("-", "\N{MINUS SIGN}")


def number(x: float) -> str:
    """A number inside mathematics, infinity as its symbol."""
    return f"{x:.3g}".replace("inf", r"\infty")


def greek(loss: str) -> str:
    """A loss's repr with its parameters as Greek letters."""
    letters = {"beta": "β", "eta": "η", "eps": "ε", "tau": "τ", "delta": "δ", "alpha": "α", "gamma": "γ", "lam": "λ"}
    for word, letter in (*letters.items(), ("=", " = ")):
        loss = loss.replace(word, letter)
    return loss
