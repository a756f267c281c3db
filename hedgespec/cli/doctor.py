"""The text of `hedgespec doctor`: what this installation can do on this machine."""

from __future__ import annotations

from typing import Any

from hedgespec.ops import backends
from hedgespec.runtime import native_forward


def describe(report: dict[str, Any] | None = None) -> str:
    """Returns `backends.report()` as lines of text.

    Args:
        report: what `backends.report` returned; None: ask it now, with self-tests.
    """
    report = backends.report(self_tests=True) if report is None else report
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
    lines += [f"  forward of a target over few tokens: {native_forward.state()}"]
    lines += ["backends"]
    wide = max([14, *(len(operation) + 2 for operation in report["operations"])])
    for operation, entries in report["operations"].items():
        lines += [f"  {operation:<{wide}}{backend:<11}{state}" for backend, state in entries.items()]
    if "self_tests" in report:
        lines += ["self-tests"]
        for operation, backend, device, results in _flat(report["self_tests"]):
            for result in dict.fromkeys(results.values()):
                dtypes = ", ".join(dtype for dtype, other in results.items() if other == result)
                lines += [f"  {operation:<{wide}}{backend:<11}{device:<8}{dtypes}: {result}"]
    if failed := failures(report):
        lines += [f"{len(failed)} self-test(s) failed: 'auto' does not use these kernels, a backend asked for by name does"]
    if native.get("remedy"):  # last, where it is seen
        lines += ["", f"WARNING: the native module could not be built when HedgeSpec was installed: {native['why']}"]
        lines += [f"  | {line}" for line in str(native["output"]).splitlines()]
        lines += [f"To get it: {native['remedy']}"]
    return "\n".join(lines)


def failures(report: dict[str, Any]) -> list[str]:
    """Returns a line for each self-test of a report that failed."""
    return [
        f"{operation} {backend} {device} {dtype} {result}"
        for operation, backend, device, results in _flat(report.get("self_tests", {}))
        for dtype, result in results.items()
        if result.startswith("failed")
    ]


def _flat(tests: dict[str, dict[str, dict[str, dict[str, str]]]]) -> list[tuple[str, str, str, dict[str, str]]]:
    return [
        (operation, backend, device, results)
        for operation, backends_of in tests.items()
        for backend, devices in backends_of.items()
        for device, results in devices.items()
    ]
