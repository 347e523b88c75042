"""Pages that a person decides by, made from run folders alone: `write_report`."""

from fewtune.report.page import write_report

__all__ = ["write_report"]
