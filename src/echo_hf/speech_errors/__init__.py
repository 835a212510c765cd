"""A metric for Hugging Face `evaluate`, self-contained: errors of words, characters and tones in recognized speech."""
