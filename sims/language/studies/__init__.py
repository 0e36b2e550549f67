"""The paper's experiments on a small language model: one module each, beside its record (tables, saved form)."""
