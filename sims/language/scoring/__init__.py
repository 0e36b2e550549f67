"""Scores of preference pairs by any causal language model."""
