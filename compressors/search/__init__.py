"""A different (pattern, bits) for every weight under a budget."""
