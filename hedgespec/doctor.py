"""The text of `hedgespec doctor`: what this installation can do on this machine."""

from __future__ import annotations

from typing import Any

from hedgespec import backends


def describe(report: dict[str, Any] | None = None) -> str:
    """Returns the report of `backends.report` as lines of text.

    Args:
        report: what `backends.report` returned; None calls it.
    """
    report = backends.report() if report is None else report
    lines = ["versions"]
    lines += [f"  {name:<14}{version or 'not installed'}" for name, version in report["versions"].items()]
    lines += ["devices"]
    lines += [f"  {device}" for device in report["devices"]]
    lines += [f"  torch uses {report['threads']} thread(s)", "native module"]
    native = report["native"]
    if native["built"]:
        threading = "OpenMP" if native["openmp"] else "one thread (no OpenMP)"
        lines += [f"  built with {native['compiler']}, {threading}; runs {native['instruction_set']}"]
        reason = f": {native['cuda_build']}" if native.get("cuda_build") else ""
        lines += [f"  CUDA kernels {'for ' + native['cuda'] if native['cuda'] else 'not built' + reason}"]
    else:
        lines += [f"  {native['why']}"]
    lines += ["backends"]
    width = max([14, *(len(operation) + 1 for operation in report["operations"])])
    for operation, entries in report["operations"].items():
        lines += [f"  {operation:<{width}}{backend:<11}{state}" for backend, state in entries.items()]
    if native.get("remedy"):  # last, where it is seen
        lines += ["", f"WARNING: the native module could not be built when HedgeSpec was installed: {native['why']}"]
        lines += [f"  | {line}" for line in str(native["output"]).splitlines()]
        lines += [f"To get it: {native['remedy']}"]
    return "\n".join(lines)
