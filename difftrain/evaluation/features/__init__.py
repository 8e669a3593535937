"""Feature extractors: one network, one file."""
