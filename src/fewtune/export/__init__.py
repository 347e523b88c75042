"""Tuned models in the forms that other programs read: `export_task`."""

from fewtune.export.task import FORMATS, export_task

__all__ = ["FORMATS", "export_task"]
