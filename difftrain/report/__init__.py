"""Shows a run, or a comparison of recipes, as one self-contained HTML file.

Reads only what a run folder holds and imports no torch: a report can be rewritten on any machine,
for a run in any state.
"""

from difftrain.report.comparison import write_comparison
from difftrain.report.run import write_report

__all__ = ["write_comparison", "write_report"]
