"""One self-contained HTML page about an unlearning run and its comparison: where, is it gone, and how do we know.

`write_report(path, Report(...))` writes it; the records say what goes in. How to read it: docs/reading_the_report.md.
"""

from unlearn.report.page import render, write_report
from unlearn.report.records import Answer, Report, ReportModel, Retraced

__all__ = ["Answer", "Report", "ReportModel", "Retraced", "render", "write_report"]
