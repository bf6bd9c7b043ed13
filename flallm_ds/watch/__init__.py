"""`flallm watch`: the state of a run from the files in its folder; no slow import."""
