"""The findings as a Markdown page."""

from typing import Any

Results = dict[str, Any]


def report(results: Results) -> str:
    """Shows the machine, one line per step, then the findings of each step."""
    machine, steps = results["machine"], results["steps"]
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    lines = ["# GPU check", "", f"`{results['command']}`, {results['date']}.", "", f"{about}.", ""]
    lines += ["| step | how it ended | seconds | checks |", "|---|---|--:|---|"]
    for name, step in steps.items():
        checks = [line for line in step["lines"] if "check" in line]
        passed = sum(check["passed"] for check in checks)
        told = f"{passed} of {len(checks)} passed" if checks else ""
        lines.append(f"| {name} | {step['status']} | {step['seconds']:.0f} | {told} |")
    for name, step in steps.items():
        if step["lines"] or step["last_lines"]:
            lines += ["", f"## {name}", *_step(step)]
    return "\n".join(lines) + "\n"


def failures(results: Results) -> list[str]:
    """Names every step and every check that failed."""
    found = []
    for name, step in results["steps"].items():
        if step["status"].startswith(("failed", "cut off", "not started")):
            found.append(f"{name} {step['status']}")
        found += [f"{name}: {line['check']}" for line in step["lines"] if "check" in line and not line["passed"]]
    return found


def _step(step: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    tables: dict[str, list[dict[str, Any]]] = {}
    for line in step["lines"]:
        if "table" in line:
            tables.setdefault(line["table"], []).append(line["cells"])
    for title, rows in tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"### {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_cell(row.get(key, "")) for key in columns) + " |" for row in rows]
    checks = [line for line in step["lines"] if "check" in line]
    if checks:
        lines += ["", "| check | value | at most | |", "|---|--:|--:|---|"]
        for line in checks:
            verdict = "passed" if line["passed"] else "**failed**"
            lines.append(f"| {line['check']} | {_cell(line['value'])} | {_cell(line['at_most'])} | {verdict} |")
    notes = [line["note"] for line in step["lines"] if "note" in line]
    notes += [f"Skipped: {line['skipped']} ({line['why']})." for line in step["lines"] if "skipped" in line]
    for note in notes:
        lines += ["", note]
    if step["last_lines"]:
        lines += ["", "Its last lines:", "", "```", *step["last_lines"], "```"]
    return lines


def _cell(value: Any) -> str:
    """A number with four digits; a bar would end the cell.

    >>> _cell(0.000123456), _cell(12345.6), _cell(7), _cell("a|b")
    ('0.0001235', '12,346', '7', 'a/b')
    """
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "/")
