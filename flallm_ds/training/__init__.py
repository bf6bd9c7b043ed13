"""Training: build turns a RunConfig into objects, trainer runs them, engine alone imports deepspeed."""
