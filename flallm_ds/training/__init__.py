"""Training: build turns a RunConfig into objects, trainer runs them, engine knows DeepSpeed."""
