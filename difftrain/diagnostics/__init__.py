"""What papers look at besides scores: errors by noise level, drift, smoothness, inversion.

Each diagnostic is a registered part that looks at a `Subject` and returns plain data for
RUN/diagnostics.json.
"""
