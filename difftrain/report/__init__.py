"""A run, or a comparison of recipes, as one self-contained HTML file: the scores, then pictures, then numbers.

Reads only what a run folder holds, and imports no torch: a report can be rewritten anywhere, for a run in any state.
"""

from difftrain.report.comparison import write_comparison
from difftrain.report.run import write_report

__all__ = ["write_comparison", "write_report"]
