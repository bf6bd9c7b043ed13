"""Process texts: languages, normalisation, token ids, prompts."""
