cpu_level: int
cpu_level_of_machine: int
cpu_has_avx512_bf16: bool
compiler: str
cuda_architectures: str | None
cuda_runtime_version: int
cpu_ops: list[str]
cuda_ops: list[str]

def cuda_driver_version() -> int: ...
