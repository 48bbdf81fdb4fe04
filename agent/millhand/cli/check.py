"""`millhand check`: errors, warnings, remedies."""

from __future__ import annotations

import click

from millhand.cli.output import Output, json_option, plural, silence_registry, wrapped

MARKS = {"ok": "ok  ", "warning": "WARN", "error": "FAIL"}


@click.command("check")
@json_option
@click.pass_context
def command(ctx: click.Context) -> None:
    """Check this node: configuration, folders, clock, hardware, plugins, models, workers, ports, broker, daemon.

    Each provider that the models ask of ONNX Runtime is tried in a process of its own.

    Exits 0 if all is well, 3 if there are warnings, 4 if there are errors.
    """
    from millhand.cli import EXIT_CODES
    from millhand.diagnosis import diagnose

    output: Output = ctx.obj
    silence_registry()
    findings = diagnose(output.config_path)
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    lines = []
    for finding in findings:
        head = f"{MARKS[finding.level]}  {finding.name}: {finding.message}"
        lines += wrapped(head, rest=" " * 6)
        if finding.hint and finding.level != "ok":
            lines += wrapped(f"Try: {finding.hint}", " " * 6, " " * 11)
    lines.append(f"{plural(errors, 'error')}, {plural(warnings, 'warning')}.")
    output.emit({"errors": errors, "warnings": warnings, "findings": [f.to_dict() for f in findings]}, lines)
    ctx.exit(EXIT_CODES["check_errors"] if errors else EXIT_CODES["check_warnings"] if warnings else EXIT_CODES["ok"])
