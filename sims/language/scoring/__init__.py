"""Scores of preference pairs by any causal language model, of one pair or of a data set of any size."""

from sims.language.scoring.scorer import COLUMNS, DEFAULT, Scorer

__all__ = ["COLUMNS", "DEFAULT", "Scorer"]
