from torch import Tensor

OPENMP: int
CHUNK_ELEMENTS: int
SEGMENT_BYTES: int
HYPER_BYTES: int

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
    threads: int,
    /,
) -> None: ...
def prepare_to_look(tensor: type, parameter: type, /) -> bool: ...
def look(
    params: list[Tensor], rows: int, use: bool, addresses: int, pointers: int, versions: int, /
) -> tuple[list[int], list[int]]: ...
def take_versions(params: list[Tensor], versions: int, /) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str, /) -> None: ...
