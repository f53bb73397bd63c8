"""What a check found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Grade = Literal["ok", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check on one host, or of the whole world."""

    check: str
    grade: Grade
    found: str
    """Values with their units."""
    fix: str = ""
    """What to do about it; empty when there is nothing to do."""


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, grade="ok", found=found)


def warning(check: str, found: str, fix: str) -> Finding:
    return Finding(check=check, grade="warning", found=found, fix=fix)


def error(check: str, found: str, fix: str) -> Finding:
    return Finding(check=check, grade="error", found=found, fix=fix)


def report(findings: Sequence[tuple[str, Finding]]) -> str:
    """A line for each check; hosts that agree share one.

    Args:
        findings: (host, what was found there).
    """
    hosts: dict[Finding, list[str]] = {}
    for host, finding in findings:
        hosts.setdefault(finding, []).append(host)
    every = list(dict.fromkeys(host for host, _ in findings))
    lines = []
    for finding, found_on in hosts.items():
        where = "" if len(set(found_on)) == len(every) else f" [{', '.join(dict.fromkeys(found_on))}]"
        fix = f"  -> {finding.fix}" if finding.fix else ""
        lines.append(f"{finding.grade:7} {finding.check:12} {finding.found}{where}{fix}")
    return "\n".join(lines)


def worst(findings: Sequence[tuple[str, Finding]]) -> Grade:
    """The worst grade of all."""
    grades = {finding.grade for _, finding in findings}
    return "error" if "error" in grades else "warning" if "warning" in grades else "ok"
