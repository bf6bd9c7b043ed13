"""Training: build turns a RunConfig into objects, trainer runs them, engine is the only import of deepspeed."""
