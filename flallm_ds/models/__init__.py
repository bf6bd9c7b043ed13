"""The two-stage model: visual encoder, adapters, Light-T, LLM."""
