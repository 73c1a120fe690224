from torch import Tensor

OPENMP: int
CHUNK_ELEMENTS: int
SEGMENT: str  # members of the structs of csrc/nexus_math.h, with ", " between them
HYPER: str
CUDA_TARGETS: str  # empty: built without the CUDA kernels and all that follows
CUDA_MAX_NORMS: int

def sq_norm(rows: int, n: int, chunks: int, dtype: int, partials: int, threads: int, /) -> float: ...
def inner_step(
    rows: int, n: int, chunks: int, dtype: int, factor: int, moves: int, lost_moves: int, threads: int, /
) -> None: ...
def outer_step(
    rows: int,
    n: int,
    chunks: int,
    dtype: int,
    hyper: int,
    factor: int,
    walk_length: int,
    displacement_sq: int,
    partials: int,
    displaced: bool,
    threads: int,
    /,
) -> None: ...
def displace(
    rows: int, n: int, chunks: int, dtype: int, factor: int, share: float, in_weight: bool, threads: int, /
) -> None: ...
def prepare_to_look(tensor: type, parameter: type, /) -> bool: ...
def prepare_to_look_at_dtensors(dtensor: type | None, /) -> None: ...
def look(
    params: list[Tensor], rows: int, use: bool, addresses: int, pointers: int, versions: int, objects: int, /
) -> tuple[list[int], list[int]]: ...
def take_versions(params: list[Tensor], versions: int, alone: bool, /) -> bool: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str, /) -> None: ...
def cuda_why_not(device: int, /) -> str: ...
def cuda_capture_id(stream: int, /) -> int: ...
def cuda_sq_norm(
    table: tuple[int, ...], dtype: int, partials: int, norm: int, arrivals: int, where: tuple[int, ...], /
) -> None: ...
def cuda_inner_step(
    table: tuple[int, ...],
    dtype: int,
    cycle: tuple[int, ...],
    norms: list[int],
    micro_batch: tuple[int, ...],
    where: tuple[int, ...],
    /,
) -> None: ...
def cuda_outer_step(
    table: tuple[int, ...],
    dtype: int,
    amsgrad: bool,
    cycle: tuple[int, ...],
    norms: list[int],
    micro_batch: tuple[int, ...],
    taken: int,
    displacement_sq: int,
    arrivals: int,
    displaced: bool,
    where: tuple[int, ...],
    /,
) -> None: ...
def cuda_displace(
    table: tuple[int, ...],
    dtype: int,
    cycle: tuple[int, ...],
    norms: list[int],
    micro_batch: tuple[int, ...],
    share: float,
    in_weight: bool,
    where: tuple[int, ...],
    /,
) -> None: ...
