"""What is known of GPUs, in one table, as NVIDIA and AMD publish it; nothing here needs a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from ..program.memory import rounded_up

#: Where kernels run: an NVIDIA compute capability (80 for sm_80), AMD's name, or the interpreter.
Architecture = int | str
INTERPRETER = "interpreter"
#: Warp instructions that an NVIDIA multiprocessor starts a cycle, one a scheduler.
ISSUED = 4


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor of a compute capability holds, and what a block may take; shared in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_of_block: int
    reserved: int  # shared bytes that every block takes besides its own
    granularity: int  # of shared bytes
    registers: int = 65536

    def resident_warps(self, warps: int, registers: int, shared: int) -> int:
        """Warps at once of blocks of ``warps`` warps, ``registers`` a thread and ``shared`` bytes a block.

        NVIDIA's occupancy arithmetic: registers come 256 a warp at a time, on four partitions.
        """
        by_registers = self.registers // max(rounded_up(registers * 32, 256), 1) // 4 * 4
        taken = rounded_up(shared + self.reserved, self.granularity)
        by_shared = self.shared // taken if taken else self.blocks
        return warps * min(self.blocks, self.warps // warps, by_registers // warps, by_shared)


def _ampere(warps: int, blocks: int, kib: int) -> Multiprocessor:
    return Multiprocessor(warps, blocks, kib * 1024, (kib - 1) * 1024, 1024, 128)


@dataclass(frozen=True)
class Gpu:
    """An architecture, by a usual device of it.

    Attributes:
        device: its name.
        processors: multiprocessors (AMD: compute units) of the device.
        tf32: AMD's: whether its matrix instructions compute in TF32 (NVIDIA's: program/arithmetic.py).
        multiprocessor: what one holds (CUDA C++ Programming Guide, technical specifications); None for AMD's.
        bandwidth: published bytes a second of the device's memory; 0 where no time is predicted for it.
        rate: published dense fp16 operations (fp32 sums) a second.
        clock: cycles a second of a multiprocessor, on which that rate rests.
        triton_rate: of Triton's products, where that is another.
    """

    device: str
    processors: int
    multiprocessor: Multiprocessor | None = None
    bandwidth: float = 0.0
    rate: float = 0.0
    clock: float = 0.0
    triton_rate: float = 0.0
    tf32: bool = False


_TURING = Multiprocessor(32, 16, 65536, 65536, 0, 256)

GPUS: dict[Architecture, Gpu] = {
    # Triton has no products for Turing's tensor cores: there its rate is that of fp32 arithmetic.
    75: Gpu("T4", 40, _TURING, 320e9, 65e12, 1.59e9, 8.1e12),
    80: Gpu("A100", 108, _ampere(64, 32, 164), 2039e9, 312e12, 1.41e9),
    86: Gpu("A10", 72, _ampere(48, 16, 100), 600e9, 125e12, 1.695e9),
    87: Gpu("Orin", 16, _ampere(48, 16, 164), 204.8e9, 42.5e12, 1.3e9),
    89: Gpu("RTX 4090", 128, _ampere(48, 24, 100), 1008e9, 165e12, 2.52e9),
    90: Gpu("H100", 132, _ampere(64, 32, 228), 3350e9, 989e12, 1.83e9),
    100: Gpu("B200", 148, _ampere(64, 32, 228)),
    120: Gpu("RTX 5090", 170, _ampere(48, 24, 100)),
    "gfx90a": Gpu("MI200", 104),
    "gfx942": Gpu("MI300X", 304, tf32=True),
}

#: By NVIDIA compute capability.
MULTIPROCESSORS: dict[Architecture, Multiprocessor] = {
    architecture: gpu.multiprocessor
    for architecture, gpu in GPUS.items()
    if gpu.multiprocessor is not None
}
