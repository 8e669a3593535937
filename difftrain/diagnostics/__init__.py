"""What papers look at beside scores of the generated images: errors by noise level, drift along sampling, smoothness, inversion.

Each is a registered part that takes a `Subject` and returns plain data for RUN/diagnostics.json. Nothing is imported here: the charts
are drawn where there is no torch.
"""
