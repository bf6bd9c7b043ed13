"""Texts: languages, normalisation, token ids, prompts."""
