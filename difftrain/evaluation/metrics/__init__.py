"""Metrics: a family of scores a file."""
