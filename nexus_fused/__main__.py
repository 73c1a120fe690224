"""`python -m nexus_fused`: what runs here, and why something does not; `memory`: what a training step needs."""

from __future__ import annotations

import argparse
import importlib
import math
import platform
from collections.abc import Iterator, Sequence

import torch

from . import __version__, backends, memory
from .flat import STATE_DTYPE

GIB = 2**30
SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STATE_DTYPE}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the arguments name, `report` where there are none."""
    given = parse(arguments)
    if given.command == "memory":
        print("\n".join(memory_table(given)))
    else:
        report()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; argparse ends the program where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m nexus_fused", description="The Nexus optimizer for PyTorch.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    said = "what runs on this machine, and why something does not; also without any command"
    commands.add_parser("report", help=said, description=f"Prints {said}.")
    said = "what a training step needs at its peak, for AdamW and for Nexus"
    counted = commands.add_parser(
        "memory",
        help=said,
        description=f"Prints {said}: bytes per parameter, and GiB on each rank, of weights, gradients and the "
        "optimizer's state.",
        epilog="Example: python -m nexus_fused memory 7B --dtype bfloat16 --ranks 8",
    )
    add = counted.add_argument
    add("parameters", type=model_size, help="how many the model has: 7e9, 7B or 350M")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the parameters (default: %(default)s)")
    add(
        "--gradients",
        choices=DTYPES,
        help="dtype of the gradients, for optimizers that read another than the parameters' (the default)",
    )
    add("--inner-steps", type=count, default=4, metavar="K", help="micro-batches in a cycle (default: %(default)s)")
    add(
        "--ranks",
        type=count,
        default=1,
        help="how many ranks share one copy of the model, as in FSDP2 (default: %(default)s)",
    )
    add("--amsgrad", action="store_true", help="keep the maxima of second moments too")
    add(
        "--state-bytes",
        type=state_bytes,
        metavar="S",
        help="adds rows for an optimizer that keeps S bytes per parameter, such as 4 for Muon in float32",
    )
    return parser.parse_args(arguments)


def model_size(text: str) -> float:
    """Reads "7e9", "7B" or "350M" as a number of parameters."""
    factor = SUFFIXES.get(text[-1:].upper(), 1.0)
    return _number(text[:-1] if factor > 1 else text, factor, 1, "a number of at least 1, such as 7e9, 7B or 350M")


def state_bytes(text: str) -> float:
    """Reads a number of bytes, which need not be whole."""
    return _number(text, 1.0, 0, "a number of at least 0")


def count(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text!r}")
    return int(text)


def _number(text: str, factor: float, low: float, wanted: str) -> float:
    try:
        value = float(text) * factor
    except ValueError:
        value = math.nan
    if not low <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be {wanted}, but {text!r} was given")
    return value


def memory_table(given: argparse.Namespace) -> Iterator[str]:
    """Yields the lines of the table: bytes per parameter, and what they come to on each rank."""
    gradients = DTYPES[given.gradients] if given.gradients else None
    rows = memory.compared(
        DTYPES[given.dtype], given.inner_steps, gradients=gradients, amsgrad=given.amsgrad, state=given.state_bytes
    )
    gib = given.parameters / given.ranks / GIB
    ranks = "1 rank" if given.ranks == 1 else f"{given.ranks} ranks"
    read = f", {given.gradients} gradients" if given.gradients else ""
    yield f"{given.parameters:,.0f} parameters, {given.dtype}{read}, K = {given.inner_steps}, {ranks}"
    yield "Bytes per parameter at the peak of a training step, and GiB on each rank:\n"
    columns = "{:<46}{:>8}{:>10}{:>9}{:>6}{:>6}{:>11}{:>7}{:>11}"
    yield columns.format("", "weight", "gradient", "moments", "walk", "sum", "GiB", "host", "GiB")
    for name, row in rows.items():
        each = f"{row.device:g}", f"{row.device * gib:,.2f}", f"{row.host:g}", f"{row.host * gib:,.2f}"
        yield columns.format(name, row.weight, row.gradient, f"{row.moments:g}", row.walk, *each)
    yield ""
    yield "weight: with its remainder or float32 master. walk: D, and the anchor of local walks. host: pinned memory."
    yield "Not counted: activations, gathered weights, padding to 64 bytes, and 4 bytes for each tensor's `step`."


def report() -> None:
    """Prints versions, devices, threads, instruction set and the backends of this machine."""
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:  # the table below says why
        triton = "none"
    cuda = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})" if torch.cuda.is_available() else "none"
    print(f"nexus_fused  {__version__}")
    print(f"torch        {torch.__version__}")
    print(f"triton       {triton}")
    print(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"GPU          {cuda}")
    print(f"threads      {torch.get_num_threads()} (torch.set_num_threads)")
    print(f"instructions {backends.instruction_set()}")
    print(f"CUDA kernels {backends.cuda_targets()}")
    print("\nbackends, as NexusAdamW(backend=...) takes them:")
    for name, reason in backends.available().items():
        print(f"  {name:10} {'available' if reason is None else 'missing: ' + reason}")
    gpu = ["cuda"] if torch.cuda.is_available() else []
    for device in map(torch.device, ["cpu", *gpu]):
        print(f"\nbackend=None on {device}: {backends.chosen(device)}")


if __name__ == "__main__":
    main()
