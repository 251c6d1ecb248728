"""Draws a quantization report: one self-contained HTML page, or a few lines for a terminal."""

from awq.report.page import render_page
from awq.report.read import ReportView, read_report
from awq.report.text import render_text

__all__ = ["ReportView", "read_report", "render_page", "render_text"]
