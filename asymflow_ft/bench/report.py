"""A benchmark's figures as a table for a terminal, and the machine that they are of."""

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND

from asymflow_ft.bench.sweep import total_memory

PACKAGES = ("asymflow-ft", "torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes")
Rows = Sequence[Sequence[str]]


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on. load: running processes of the last minute, before the benchmark's own."""
    found: dict[str, Any] = {
        "system": platform.platform(), "python": platform.python_version(), "cpus": psutil.cpu_count(),
        "threads": torch.get_num_threads(), "cpu": _cpu_name(), "load": round(psutil.getloadavg()[0], 2),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1), "versions": _versions(), "command": sys.argv[1:],
        "attention": DIFFUSERS_ATTN_BACKEND,
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "card_gb": round(properties.total_memory / 1e9, 1),
                  "cuda": torch.version.cuda, "driver": _driver()}  # fmt: skip
    return found


def _versions() -> dict[str, str | None]:
    installed = {item.metadata["Name"].lower() for item in metadata.distributions() if item.metadata["Name"]}
    return {name: metadata.version(name) if name in installed else None for name in PACKAGES}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str | None:
    file = Path("/proc/driver/nvidia/version")
    return file.read_text().splitlines()[0] if file.is_file() else None


def grid(rows: Rows) -> str:
    """Rows of cells, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]  # noqa: B905
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def digits(value: float) -> str:
    """Three of them, without a power of ten."""
    return f"{Decimal(f'{value:.3g}'):f}"


def in_unit(value: float, unit: str, thousandth: str, least: float = 1) -> str:
    """A value in `unit`, or in its `thousandth` if it is less than `least` once it is rounded."""
    rounded = float(f"{value:.3g}")
    return f"{digits(rounded)} {unit}" if rounded >= least else f"{digits(1000 * rounded)} {thousandth}"


def seconds(value: float) -> str:
    return in_unit(value, "s", "ms")


def spread(timing: Mapping[str, Any]) -> list[str]:
    """Median and quartiles of a `Timing`."""
    return [seconds(timing["median"]), f"{seconds(timing['low'])} - {seconds(timing['high'])}"]


def size(value: float | None) -> str:
    return "not measured" if value is None else in_unit(value / 1e9, "GB", "MB", least=0.1)


def rate(tflops: float) -> str:
    return in_unit(tflops, "TFLOP/s", "GFLOP/s")


def step_table(result: Mapping[str, Any]) -> str:
    step, counted = result["step"], result["operations"]
    times = [["", "median", "quartiles", "share"], ["whole step", *spread(step), "100 %"]]
    times += [
        [f"  {part}", *spread(timing), f"{result['shares'][part]:.1%}"] for part, timing in result["parts"].items()
    ]
    per_forward = counted["step"] / counted["forward"]
    mfu = "not measured (no data sheet for this device in bf16)" if result["mfu"] is None else f"{result['mfu']:.1%}"
    shape = " x ".join(map(str, result["matmul"]["shape"]))
    lines = [
        f"{parameters(result)}; {digits(result['samples_per_second'])} samples/s",
        f"counted: {digits(counted['step'] / 1e12)} TFLOP a step, {per_forward:.2f} forward passes of "
        f"{digits(counted['forward'] / 1e12)}; {rate(result['tflops'])}",
        f"floor: {result['floor']['forwards']} forward passes at {rate(result['matmul']['tflops'])} (measured, "
        f"{shape}) = {seconds(result['floor']['seconds'])}; measured over floor {result['over_floor']:.2f}",
        f"share of the matmul rate {result['share_of_matmul_rate']:.1%}; MFU {mfu}",
    ]
    return "\n\n".join([grid(times), memory_grid(result), "\n".join(lines)])


def parameters(result: Mapping[str, Any]) -> str:
    return f"{result['parameters']:,} parameters, {result['trained']:,} trained; {result['tokens']} tokens in a batch"


def memory_grid(result: Mapping[str, Any]) -> str:
    rows = [["memory", "planned", "measured"]]
    rows += [[f"  {name}", size(item["planned"]), size(item["measured"])] for name, item in result["memory"].items()]
    rows += [["  all", *(size(total_memory(result, kind)) for kind in ("planned", "measured"))]]
    if result["reserved_bytes"] is not None:
        rows += [["reserved by the allocator", "", size(result["reserved_bytes"])]]
    return grid(rows)


def memory_table(result: Mapping[str, Any]) -> str:
    return f"{memory_grid(result)}\n\n{parameters(result)}"


def sample_table(result: Mapping[str, Any]) -> str:
    rows = [["", "median", "quartiles"]]
    lines = []
    for name in ("eager", "compiled"):
        if name not in result:
            continue
        figures = result[name]
        for kind in ("pixel", "latent"):
            own = figures[kind]
            rows += [
                [f"{name}: {kind} step", *spread(own["step"])],
                ["  outside the network", f"{own['outside_network']:.1%}", ""],
                ["  first step, with set-up", *spread(own["first_step"])],
                ["  the process's first one", seconds(own["first_step_cold"]), ""],
            ]
        pairs = figures["pairs"]
        rows += [[f"{name}: guidance, two calls", *spread(pairs["two_calls"])],
                 [f"{name}: guidance, one batch", *spread(pairs["one_batch"])]]  # fmt: skip
        lines.append(
            f"{name}: pixel over latent step {figures['pixel_over_latent']:.3f}; guidance as one batch over two calls "
            f"{pairs['one_batch_over_two_calls']:.3f}"
        )
    for kind, held in result["memory"].items():
        rows += [[f"memory: {kind} step", size(held["network"] + held["drawing"]), f"network {size(held['network'])}"]]
    rows += [[f"arithmetic: {name}", *spread(timing)] for name, timing in result["arithmetic"].items()]
    rows += [[f"decode: {name}", *spread(timing)] for name, timing in result["decode"].items()]
    lines.append(f"recovery, guidance and clamp: {result['arithmetic_share']:.1%} of an eager pixel step")
    return "\n\n".join([grid(rows), "\n".join(lines)])


def align_table(result: Mapping[str, Any]) -> str:
    count, threads = result["images"], result["threads"]
    rows = [[f"seconds per picture, of {count}", "median", "quartiles"]]
    rows += [[f"  {stage}", *spread(timing)] for stage, timing in result["stages"].items()]
    rows += [["once", "", ""], *([f"  {name}", *spread(timing)] for name, timing in result["ends"].items())]
    rows += [["pictures together", "", ""]]
    rows += [[f"  {name}", *spread(timing)] for name, timing in result["passes"].items()]
    rows += memory_rows(result)
    lines = [
        f"align over decode + encode {result['align_over_decode_encode']:.3f} with {threads} threads that decode, "
        f"{result['without_threads']:.3f} without; {result['thousand_images']:.3f} for 1,000 pictures, solving and "
        "drawing report.png included",
        f"align grows {growth(result['growth'])}",
    ]
    return "\n\n".join([grid(rows), "\n".join(lines)])


def memory_rows(result: Mapping[str, Any]) -> Rows:
    return [["memory", "", ""], *([f"  {name}", size(held), ""] for name, held in result["memory"].items())]


def growth(found: Mapping[str, Any], shown: Callable[[float], str] = seconds) -> str:
    return (
        f"with the power {found['exponent']:.2f} of {', '.join(f'{n:,}' for n in found['sizes'])}: "
        f"{shown(found['fixed'])} + {shown(found['each'])} each"
    )


def cache_table(result: Mapping[str, Any]) -> str:
    rows = [["per picture", "median", "quartiles"]]
    rows += [[f"  {name}", *spread(timing)] for name, timing in result["fill"].items()]
    rows += [["per training sample", "", ""]]
    rows += [[f"  {name}", *spread(timing)] for name, timing in result["read"].items()]
    for name, wait in result["wait"].items():
        rows += [[f"training step, {name}", *spread(wait["step"])], ["  waits for data", *spread(wait["wait"])]]
    for count, both in result["starts"].items():
        rows += [[f"{name}, {int(count):,} pictures", *spread(timing)] for name, timing in both.items()]
    rows += memory_rows(result)
    waits = ", ".join(f"{wait['share']:.1%} ({name})" for name, wait in result["wait"].items())
    lines = [
        f"filling: {digits(result['pictures_per_second'])} pictures/s of {size(result['bytes_per_picture'])}, written "
        f"at {size(result['bytes_per_second'])}/s; reading: {digits(result['samples_per_second'])} samples/s",
        f"waits for data: {waits} of a step",
        *(f"{name} grows {growth(found)}" for name, found in result["growth"].items()),
    ]
    return "\n\n".join([grid(rows), "\n".join(lines)])


def memory_sweep_table(result: Mapping[str, Any]) -> str:
    runs = result["runs"]
    items = list(next(run for run in runs.values() if run is not None)["memory"])
    rows = [[result["key"], "tokens", *items, "all", "planned"]]
    for value, run in runs.items():
        if run is None:
            rows += [[f"{value}: out of memory", *[""] * (len(rows[0]) - 1)]]
            continue
        held = [size(run["memory"][item]["measured"]) for item in items]
        rows += [[str(value), str(run["tokens"]), *held, *(size(total_memory(run, kind))
                                                           for kind in ("measured", "planned"))]]  # fmt: skip
    lines = [f"against {result['against']}:"]
    if "memory" in result["growth"]:
        lines += [f"  memory grows {growth(result['growth']['memory'], size)}"]
    return "\n\n".join([grid(rows), "\n".join(lines)])


def sweep_table(result: Mapping[str, Any]) -> str:
    if result["of"] == "memory":
        return memory_sweep_table(result)
    found, clock = result["growth"], result["clock"]
    own = ["processor"] if clock == "processor" else []
    rows = [[result["key"], "tokens", "step", "quartiles", *own, "forward", "recompute", "backward", "memory",
             "planned", "over floor"]]  # fmt: skip
    for value, run in result["runs"].items():
        if run is None:
            rows += [[f"{value}: out of memory", *[""] * (len(rows[0]) - 1)]]
            continue
        part = {name: timing["median"] for name, timing in run["parts"].items()}
        times = [part["reference forward"] + part["student forward"], part["recompute"], part["backward"]]
        memory = [size(total_memory(run, kind)) for kind in ("measured", "planned")]
        rows += [[str(value), str(run["tokens"]), *spread(run["step"]), *(seconds(run["step"][name]) for name in own),
                  *map(seconds, times), *memory, f"{run['over_floor']:.2f}"]]  # fmt: skip
    lines = [f"against {result['against']}:"]
    if "step" in found:
        lines += [f"  the step ({clock}) grows {growth(found['step'])}; its counted operations with the power "
                  f"{found['operations']['exponent']:.2f}"]  # fmt: skip
    if "memory" in found:
        lines += [f"  memory grows {growth(found['memory'], size)}"]
    return "\n\n".join([grid(rows), "\n".join(lines)])


def targets_table(result: Mapping[str, Any]) -> str:
    rows = [["target", "limit", "reached", "verdict"]]
    for target in result["targets"]:
        sign, unit, reached = ">=" if target["at_least"] else "<=", target["unit"], target["reached"]
        said = f"not measured: {target['why']}" if reached is None else verdict(target)
        shown = "" if reached is None else f"{digits(reached)}{unit}"
        rows.append([target["what"], f"{sign} {target['limit']:g}{unit}", shown, said])
    return f"{targets_title(result)}\n\n{grid(rows)}"


def targets_title(result: Mapping[str, Any]) -> str:
    """What was measured, in a line."""
    step = next(step for step in result["steps"].values() if step is not None)
    options = step["options"]
    precision = "bf16" if options["precision"] == "bf16" else "float32"
    compiled = ", compiled" if options["compile"] else ""
    return (
        f"{result['architecture']} at {step['resolution']} px, batch {options['batch']}, {precision}{compiled}; "
        f"training LoRA of rank {options['rank']}, perceptual term: {options['perceptual']}"
    )


def verdict(target: Mapping[str, Any]) -> str:
    """Of a target that was measured."""
    return "missed" if target["over_limit"] > 1 else "met"


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "step": step_table, "memory": memory_table, "align": align_table, "cache": cache_table, "sample": sample_table,
    "sweep": sweep_table, "targets": targets_table,
}  # fmt: skip
