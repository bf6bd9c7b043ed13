"""`flallm demo`: a local page on which a model translates videos."""
