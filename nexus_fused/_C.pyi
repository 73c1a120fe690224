from collections.abc import Callable

from torch import Tensor

OPENMP: int
CHUNK_ELEMENTS: int
SEGMENT: str  # members of the structs of csrc/nexus_math.h, with ", " between them
HYPER: str
CUDA_TARGETS: str  # empty: built without the CUDA kernels and all that follows
CUDA_MAX_NORMS: int

def sq_norm(rows: int, n: int, chunks: int, partials: int, threads: int, /) -> float: ...
def advance(
    hyper: int,
    factor: int,
    sums: int,
    totals: int,
    groups: int,
    position: int,
    sq_norm: float,
    grad_scale: float,
    found_inf: bool,
    /,
) -> None: ...
def inner_step(
    rows: int,
    n: int,
    chunks: int,
    dtype: int,
    of_displacement: int,
    factor: int,
    of_parameter: bool,
    moves: int,
    lost_moves: int,
    threads: int,
    /,
) -> None: ...
def end_walk(
    rows: int, n: int, chunks: int, dtype: int, of_displacement: int, factor: int, share: float, threads: int, /
) -> None: ...
def gradients(
    rows: int,
    n: int,
    chunks: int,
    dtype: int,
    of_displacement: int,
    scale: int,
    displacement_sq: int,
    partials: int,
    threads: int,
    /,
) -> None: ...
def outer_step(
    rows: int,
    n: int,
    chunks: int,
    dtype: int,
    of_displacement: int,
    has_ended: bool,
    hyper: int,
    factor: int,
    walk_length: int,
    displacement_sq: int,
    partials: int,
    threads: int,
    /,
) -> None: ...
def prepare_to_look(tensor: type, parameter: type, /) -> bool: ...
def prepare_to_look_at_dtensors(dtensor: type | None, /) -> None: ...
def look(params: list[Tensor], rows: int, use: bool, objects: int, /) -> tuple[list[int], bool, bool]: ...
def unchanged(entries: list[dict[str, Tensor]], keys: list[str], tensors: list[Tensor], addresses: int, /) -> bool: ...
def hook_of(armed: list[Callable[[], None]], /) -> Callable[[Tensor], None]: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str, /) -> None: ...
def cuda_why_not(device: int, /) -> str: ...
def cuda_capture_id(stream: int, /) -> int: ...
def cuda_sq_norm(
    table: tuple[int, ...], partials: int, norm: int, arrivals: int, where: tuple[int, ...], /
) -> None: ...
def cuda_inner_step(
    table: tuple[int, ...],
    dtypes: tuple[int, int],
    cycle: tuple[int, ...],
    norms: list[int],
    micro_batch: tuple[int, ...],
    of_parameter: bool,
    where: tuple[int, ...],
    /,
) -> None: ...
def cuda_end_walk(
    table: tuple[int, ...],
    dtypes: tuple[int, int],
    cycle: tuple[int, ...],
    norms: list[int],
    micro_batch: tuple[int, ...],
    share: float,
    where: tuple[int, ...],
    /,
) -> None: ...
def cuda_gradients(
    table: tuple[int, ...],
    dtypes: tuple[int, int],
    scale: int,
    displacement_sq: int,
    partials: int,
    arrivals: int,
    where: tuple[int, ...],
    /,
) -> None: ...
def cuda_outer_step(
    table: tuple[int, ...],
    dtypes: tuple[int, int],
    amsgrad: bool,
    cycle: tuple[int, ...],
    norms: list[int],
    micro_batch: tuple[int, ...],
    has_ended: bool,
    taken: int,
    displacement_sq: int,
    arrivals: int,
    where: tuple[int, ...],
    /,
) -> None: ...
