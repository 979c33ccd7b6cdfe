"""Tool calls in a model's own words: read from its answer, forced upon it, shown to it."""
