"""Which score foretells a fall on one's own data and model: measured by training on some of it."""

from sims.language.validation.study import Drawn, draw_pairs, validate

__all__ = ["Drawn", "draw_pairs", "validate"]
