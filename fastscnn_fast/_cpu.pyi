"""The C++ extension (csrc/bindings.cpp): addresses and sizes in, results written in place."""

from collections.abc import Sequence

# An arithmetic is one of arithmetics(). The tag of packed weights says for which one they are packed.

# (address, n, h, w) of dense channels-last elements, float or bfloat16, with channels padded to 64 bytes
_Batch = tuple[int, int, int, int]
# (address, "float32", "bfloat16" or "uint8", (n, c, h, w), strides in elements)
_Picture = tuple[int, str, Sequence[int], Sequence[int]]
# (instruction set, encoded layers, address of the packed weights, their bytes, threads)
_Call = tuple[str, Sequence[int], int, int, int]

compiler: str
openmp: bool

def arithmetics() -> list[str]: ...
def instruction_sets(arithmetic: str | None = None, /) -> list[str]: ...
def multiply_add_roof(isa: str, arithmetic: str, threads: int, seconds: float, /) -> float: ...
def scratch_bytes() -> int: ...
def fill_scratch(byte: int, /) -> None: ...
def packed_bytes(program: Sequence[int], arithmetic: str, /) -> int: ...
def pack(
    program: Sequence[int], arithmetic: str, plain: int, bytes: int, packed: int, /
) -> None: ...
def stem_conv(call: _Call, x: _Picture, out: _Batch, /) -> None: ...
def dsconv(call: _Call, x: _Batch, out: _Batch, /) -> None: ...
def inverted_residual(call: _Call, x: _Batch, out: _Batch, /) -> None: ...
def pyramid_pooling(call: _Call, x: _Batch, out: _Batch, /) -> None: ...
def feature_fusion(call: _Call, high: _Batch, low: _Batch, out: _Batch, /) -> None: ...
def upsample_classify(call: _Call, x: _Batch, output: str, out: int, h: int, w: int, /) -> None: ...
def network(call: _Call, x: _Picture, output: str, out: int, /) -> None: ...
def network_stages(
    call: _Call, x: _Picture, output: str, out: int, /
) -> list[tuple[str, float]]: ...
def fingerprint(pieces: int, count: int, /) -> int: ...

# The training kernels (csrc/bindings_training.cpp) take (instruction set, threads, whether bfloat16, ...).
def upsampled_loss(
    isa: str,
    threads: int,
    bf16: bool,
    logits: int,
    shape: Sequence[int],
    labels: int,
    size: Sequence[int],
    align_corners: bool,
    targets: int,
    target_sums: int,
    gradient: int,
    surprise: int,
    /,
) -> float: ...
def soft_confusion(
    isa: str,
    threads: int,
    bf16: bool,
    logits: int,
    shape: Sequence[int],
    labels: int,
    size: Sequence[int],
    align_corners: bool,
    table: int,
    counted: int,
    gradient: int,
    confusion: int,
    /,
) -> None: ...
def batch_norm_forward(isa: str, threads: int, bf16: bool, /, *args: int | float) -> None: ...
def batch_norm_backward(isa: str, threads: int, bf16: bool, /, *args: int) -> None: ...
def depthwise_backward(
    isa: str,
    threads: int,
    bf16: bool,
    shape: Sequence[int],
    stride: int,
    dilation: int,
    x: int,
    y_gradient: int,
    weight: int,
    x_gradient: int,
    weight_gradient: int,
    /,
) -> None: ...
