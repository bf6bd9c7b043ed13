"""Loading, trimming and tuning any LLM of transformers."""
