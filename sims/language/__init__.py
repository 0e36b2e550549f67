"""A small language model trained here, and the paper's experiments on it (extra `[llm]`)."""
