"""What a reader must know to believe a benchmark's figures, and the figures as tables."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ["narrowly", "torch", "transformers", "peft", "nnsight", "pyvene", "transformer-lens"]


def describe(options: Any) -> dict[str, Any]:
    """The machine, the versions and the settings."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if options.device != "cpu" else None,
        "load_average": os.getloadavg()[0],
        "versions": versions,
        "settings": vars(options),
    }


def markdown(record: dict[str, Any], name: str) -> str:
    """The figures as tables."""
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    lines = [
        f"# {name}",
        "",
        f"{record['date']}, {record['gpu'] or record['cpu']}, hidden size "
        f"{record['settings']['hidden']}, {record['settings']['rounds']} rounds. {versions}.",
    ]
    if record["load_average"] > 1.5 and record["gpu"] is None:
        lines += ["", f"**Provisional: load average {record['load_average']:.1f} at the start.**"]
    lines += [
        "",
        "| what | tokens | who | ratio to bare (95 %) | added µs | ms | tokens/s | GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for what, shapes in record["figures"].items():
        for shape, peers in shapes.items():
            for who, f in peers.items():
                memory = f"{f['peak_gib']:.2f}" if "peak_gib" in f else ""
                lines.append(
                    f"| {what} | {shape} | {who} | {f['ratio']:.3f} ({f['low']:.3f} to "
                    f"{f['high']:.3f}) | {f['added_microseconds']:.0f} | {f['milliseconds']:.2f} | "
                    f"{f['tokens_per_second']:.0f} | {memory} |"
                )
    whos = list(next(iter(record["gradient_errors"].values())))
    lines += ["", "Gradient error:", "", f"| case | {' | '.join(whos)} |", "|---" * (len(whos) + 1)]
    lines[-1] += "|"
    for case, row in record["gradient_errors"].items():
        cells = [e if isinstance(e, str) else f"{e:.2g}" for e in row.values()]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
