"""Distances between two sets of feature rows."""
