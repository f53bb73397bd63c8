"""Findings of the checks and their report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Grade = Literal["ok", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of one check, on one host or over all ranks."""

    check: str
    grade: Grade
    detail: str
    """What was found, with values and units."""
    fix: str = ""
    """What to do about it; empty if nothing is to be done."""


def ok(check: str, detail: str) -> Finding:
    return Finding(check=check, grade="ok", detail=detail)


def warning(check: str, detail: str, fix: str) -> Finding:
    return Finding(check=check, grade="warning", detail=detail, fix=fix)


def error(check: str, detail: str, fix: str) -> Finding:
    return Finding(check=check, grade="error", detail=detail, fix=fix)


def report(findings: Sequence[tuple[str, Finding]]) -> str:
    """Return one line per finding; hosts with the same finding share a line.

    Args:
        findings: pairs of host and finding.
    """
    hosts: dict[Finding, list[str]] = {}
    for host, finding in findings:
        hosts.setdefault(finding, []).append(host)
    all_hosts = list(dict.fromkeys(host for host, _ in findings))
    lines = []
    for finding, finding_hosts in hosts.items():
        where = "" if len(set(finding_hosts)) == len(all_hosts) else f" [{', '.join(dict.fromkeys(finding_hosts))}]"
        fix = f"  -> {finding.fix}" if finding.fix else ""
        lines.append(f"{finding.grade:7} {finding.check:12} {finding.detail}{where}{fix}")
    return "\n".join(lines)


def worst(findings: Sequence[tuple[str, Finding]]) -> Grade:
    """Return the worst grade of all findings."""
    grades = {finding.grade for _, finding in findings}
    return "error" if "error" in grades else "warning" if "warning" in grades else "ok"
