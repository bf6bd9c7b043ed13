"""Plan a run before it starts: memory, speed, and the DeepSpeed JSON to use."""
