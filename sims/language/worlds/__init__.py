"""Worlds: what a small language model is trained on, with the frequencies that decide how words are used."""
