"""One self-contained HTML page about unlearned models and their comparison: where, is it gone, and how do we know.

`write_report(path, Report(...))` writes it; the records say what goes in; `stage.run_report` fills them from run folders. How to
read the page: docs/reading_the_report.md.
"""

from unlearn.report.page import render, write_report
from unlearn.report.records import Answer, Attacked, AttackTrial, Audited, Depth, Report, ReportModel, Retraced

__all__ = [
    "Answer",
    "AttackTrial",
    "Attacked",
    "Audited",
    "Depth",
    "Report",
    "ReportModel",
    "Retraced",
    "render",
    "write_report",
]
