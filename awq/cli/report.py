"""Show what quantization did to every linear: a few lines, or one HTML page that opens offline."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="quantized directory, or its quantization_report.json")
    parser.add_argument(
        "--html", metavar="FILE", help="write the page to FILE instead of printing lines"
    )


def run(arguments: argparse.Namespace) -> None:
    from awq.cli.output import output_file, show, whole_file
    from awq.report import read_report, render_page, render_text

    view = read_report(arguments.model)
    if arguments.html is None:
        show(view.raw, arguments.json, render_text(view))
        return

    page = render_page(view)
    with whole_file(output_file("--html", arguments.html)) as work:
        work.write_text(page, encoding="utf-8")
    show({"html": arguments.html}, arguments.json, f"wrote {arguments.html}")
