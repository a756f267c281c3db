"""What this installation can do on this machine, in words: the text of `hedgespec doctor`."""

from __future__ import annotations

from hedgespec import backends


def describe(report: dict[str, object] | None = None) -> str:
    """`backends.report()` as lines for a person.

    Args:
        report: what `backends.report` returned; None: ask it now.
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
        lines += [f"  CUDA kernels {'for ' + native['cuda'] if native['cuda'] else 'not built'}"]
    else:
        lines += [f"  not built: {native['why']}"]
    lines += ["backends"]
    for operation, entries in report["operations"].items():
        lines += [f"  {operation:<14}{backend:<11}{state}" for backend, state in entries.items()]
    return "\n".join(lines)
