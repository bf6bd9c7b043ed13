"""Write the report of runs: one HTML page with curves, scores, samples and attention."""
