"""`diffveil doctor`: prints what `diffveil.doctor` found."""

from __future__ import annotations

import argparse
import json

from diffveil.doctor import Check, Report, diagnose

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0 even where something is missing, for saying so is its job."""
    report = diagnose(args.bundle, verify=args.verify)
    print(json.dumps(report.to_json()) if args.json else describe(report))
    return 0


def describe(report: Report) -> str:
    """The report for people."""
    lines = [
        f"diffveil {report.version}, Python {report.python}",
        report.machine,
        "",
        *(_line(check) for check in report.checks),
        "",
        "Backends, best first:",
        *(_line(check, chosen=check.name == report.chosen) for check in report.backends),
        "",
        "Installed: "
        + (", ".join(f"{n} {v}" for n, v in report.packages.items() if v is not None) or "none"),
        "",
        "Ready to protect photos." if report.ready else "Not ready: see the lines marked [no].",
    ]
    return "\n".join(lines)


def _line(check: Check, *, chosen: bool = False) -> str:
    mark = "[ok]" if check.ok else "[no]"
    return f"  {mark} {check.name}: {check.detail}" + ("  <- chosen" if chosen else "")
