"""The report from run folders to a page. Wiring only."""

from __future__ import annotations

from unlearn.report.config import ReportConfig
from unlearn.report.page import write_report
from unlearn.report.records import Report
from unlearn.report.runs.caveats import left_out_sentences
from unlearn.report.runs.collect import Naming, collect
from unlearn.report.verdict import verdict


def run_report(config: ReportConfig) -> Report:
    """Read the runs and write the page to `config.page`; returns what is on it.

    Raises:
        UserError: a folder that holds nothing to report, runs that contradict each other, a page that cannot be written.
    """
    names = {folder: Naming(label=label) for folder, label in (config.labels or {}).items()}
    report = collect(config.runs, names=names, retain_model=config.retain_model)
    write_report(config.page, report)
    return report


def describe(config: ReportConfig, result: Report) -> str:
    """What the command prints: the verdict, which runs were left out, and where the page is."""
    return "\n".join([*verdict(result), *left_out_sentences(result), f"wrote {config.page}"])
