"""Worlds: what a small language model is trained on, with the frequencies that decide how words are used."""

import re


def split_words(text: str) -> list[str]:
    """Words and punctuation marks, as the models' tokenizer splits them."""
    return re.findall(r"\w+|[^\w\s]+", text)
