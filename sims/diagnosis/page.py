"""One self-contained HTML page: no script, no network, everything from the log escaped."""

from html import escape
from pathlib import Path

from sims.diagnosis.advice import Advice, advise
from sims.diagnosis.verdict import Diagnosis
from sims.files import write_atomically
from theory import __version__

COLORS = {
    "no displacement": "#00664a",
    "recovered": "#00517f",
    "displaced": "#9a3f00",
    "degenerate": "#8a0000",
    "undecided": "#555555",
}
STYLE = """
body { margin: 0 auto; max-width: 46rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a;
  background: #fff; overflow-wrap: break-word; }
h1 { font-size: 1.35rem; line-height: 1.35; border-left: .4rem solid; padding-left: .8rem; }
h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; } h3 { font-size: 1rem; margin: 1.1rem 0 .2rem; }
p, ul { margin: .4rem 0; } li { margin: .2rem 0; } small { color: #555; }
pre { overflow-x: auto; background: #f4f4f4; padding: .6rem; font-size: .85rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: #444; }
"""
CAPTIONS = (
    "Change of the mean log-probability of the responses. Below zero: less probable than before training. Lines with "
    "marks are evaluation sets, the same pairs each time; points are training batches, dashed their running "
    "mean; the bar is the interval of the end.",
    "The same against the margin gained, from dark (early) to light (late): how much of ln pi(chosen) each step cost.",
)
CANNOT = (
    "A log holds means over pairs: not which pairs fall (displacement score), nor where the probability went "
    "(displacement predict, DisplacementCallback), nor whether the answers got worse (read some)."
)


def page(d: Diagnosis) -> str:
    """The diagnosis as an HTML document that opens with the verdict."""
    from sims.plots.diagnosis import svg_figures

    verdict = d.sentence[0].upper() + d.sentence[1:]
    figures = "".join(
        f'<figure role="img" aria-label="{escape(caption)}">{svg}<figcaption>{escape(caption)}</figcaption></figure>\n'
        for svg, caption in zip(svg_figures(d), CAPTIONS, strict=False)
    )
    notes = [*d.notes, f"beta: {d.scale.source}" + (f", {d.scale.beta:.4g}" if d.scale.beta else "")]
    advice = "".join(_advice(a) for a in advise(d))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(d.verdict)}: {escape(d.log.path)}</title><style>{STYLE}</style></head><body>\n"
        f'<h1 style="border-color: {COLORS[d.verdict]}">{escape(verdict)}.</h1>\n'
        f"<p><small>{escape(str(d.log))}</small></p>\n"
        f"{_list(d.evidence)}{figures}"
        + (f"<h2>What to try</h2>\n{advice}" if advice else "")
        + f"<h2>How to read it</h2>\n<p>{escape(CANNOT)}</p>\n<p>Rule of this verdict: {escape(d.rule)}.</p>"
        f"\n{_list(notes)}<p><small>likelihood-displacement {escape(__version__)}, displacement diagnose</small></p>\n"
        "</body></html>\n"
    )


def write_page(d: Diagnosis, path: Path) -> Path:
    """`page` as a file, written atomically."""
    return write_atomically(path, page(d))


def _list(items: tuple[str, ...] | list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(x)}</li>" for x in items) + "</ul>\n" if items else ""


def _advice(a: Advice) -> str:
    lines = f"<pre>{escape(chr(10).join(a.lines))}</pre>\n" if a.lines else ""
    source = f"<p><small>Source: {escape(a.source)}</small></p>\n" if a.source else ""
    return f"<h3>{escape(a.title[0].upper() + a.title[1:])}</h3>\n<p>{escape(a.text)}.</p>\n{lines}{source}"
