"""What GPUs can do at most, by their makers' data, and what of it is reached."""

from typing import NamedTuple

from cast_sglang.errors import ProfileError
from cast_sglang.profiling.roofline import DeviceRates

__all__ = ["GPUS", "Gpu", "find_gpu"]

# What large products of bfloat16 reach of the peak: 86 % on an A100, 80 % on an H100, 78 % on a
# B200 (S. Bekman, "Machine Learning Engineering", Maximum Achievable Matmul FLOPS).
MATMUL_SHARE = 0.8
# What a pass reaches of the memory's bandwidth. A large copy reaches 0.9 on an H100; a pass is some
# hundred kernels, each of which begins and ends. With 0.8, plain decoding of Llama 3.1 8B on an
# H100 takes 6.1 ms a token; SGLang's documentation has 158 tokens a second, 6.3 ms.
MEMORY_SHARE = 0.8
# A kernel inside a replayed graph that does nothing much, as measured on an H100.
KERNEL_SECONDS = 1.3e-6
# Of an all-reduce of few bytes. On two H100 one of half a MiB with a norm takes 10 us
# (vllm-project/vllm#22086), of which the link takes 1 and the norm as much.
EXCHANGE_SECONDS = 8e-6
# The device waits so long for the host at each decision, and once a step for launches; simulated,
# see "Deciding on a GPU" in docs/results.md: 152 us a step and 55 a layer, of which a step without
# decisions has 42.
DECISION_SECONDS = 55e-6
STEP_SECONDS = 42e-6


class Gpu(NamedTuple):
    """One model of GPU."""

    name: str
    memory_bytes: int
    flops_per_second: float  # dense products of bfloat16, summed in float32; twice that in fp8
    bytes_per_second: float  # of its memory
    link_bytes_per_second: float  # to other GPUs, in one direction: NVLink, else PCIe
    has_fp8: bool
    tile_rows: int  # of its matrix instructions for many rows
    source: str

    @property
    def rates(self) -> DeviceRates:
        """What a server reaches in bfloat16."""
        return DeviceRates(
            bytes_per_second=MEMORY_SHARE * self.bytes_per_second,
            flops_per_second=MATMUL_SHARE * self.flops_per_second,
            tile_rows=self.tile_rows,
            kernel_seconds=KERNEL_SECONDS,
            link_bytes_per_second=self.link_bytes_per_second,
            exchange_seconds=EXCHANGE_SECONDS,
            decision_seconds=DECISION_SECONDS,
            step_seconds=STEP_SECONDS,
        )


# Kernels of Ampere, Ada and Hopper come in tiles of 64 rows and more (`wgmma` has 64), those of
# data centre Blackwell in tiles of 128 (`tcgen05.mma`).
GPUS = {
    "RTX4090": Gpu(
        name="NVIDIA GeForce RTX 4090",
        memory_bytes=24 << 30,
        flops_per_second=165.2e12,
        bytes_per_second=1008e9,
        link_bytes_per_second=32e9,
        has_fp8=True,
        tile_rows=64,
        source="NVIDIA Ada GPU Architecture, appendix A; no NVLink, PCIe 4.0 x16",
    ),
    "A800": Gpu(
        name="NVIDIA A800-SXM4-80GB",
        memory_bytes=80 << 30,
        flops_per_second=312e12,
        bytes_per_second=2039e9,
        link_bytes_per_second=200e9,
        has_fp8=False,
        tile_rows=64,
        source="NVIDIA A100 datasheet; an A800 is one with NVLink of 400 GB/s in both directions",
    ),
    "H20": Gpu(
        name="NVIDIA H20",
        memory_bytes=96 << 30,
        flops_per_second=148e12,
        bytes_per_second=4000e9,
        link_bytes_per_second=450e9,
        has_fp8=True,
        tile_rows=64,
        source="vendors' data of the H20: 148 TFLOPS, 4.0 TB/s, NVLink of 900 GB/s",
    ),
    "L40S": Gpu(
        name="NVIDIA L40S",
        memory_bytes=48 << 30,
        flops_per_second=362.05e12,
        bytes_per_second=864e9,
        link_bytes_per_second=32e9,
        has_fp8=True,
        tile_rows=64,
        source="NVIDIA L40S datasheet; no NVLink, PCIe 4.0 x16",
    ),
    "H100": Gpu(
        name="NVIDIA H100 80GB HBM3",
        memory_bytes=80 << 30,
        flops_per_second=989.4e12,
        bytes_per_second=3350e9,
        link_bytes_per_second=450e9,
        has_fp8=True,
        tile_rows=64,
        source="NVIDIA H100 datasheet, SXM; NVLink of 900 GB/s in both directions",
    ),
    "H200": Gpu(
        name="NVIDIA H200",
        memory_bytes=141 << 30,
        flops_per_second=989.4e12,
        bytes_per_second=4800e9,
        link_bytes_per_second=450e9,
        has_fp8=True,
        tile_rows=64,
        source="NVIDIA H200 datasheet, SXM; NVLink of 900 GB/s in both directions",
    ),
    "B200": Gpu(
        name="NVIDIA B200",
        memory_bytes=180 << 30,
        flops_per_second=2250e12,
        bytes_per_second=8000e9,
        link_bytes_per_second=900e9,
        has_fp8=True,
        tile_rows=128,
        source="NVIDIA HGX B200 data at 1000 W; NVLink of 1.8 TB/s in both directions",
    ),
}


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name, however it is written: H200, "RTX 4090", rtx-4090.

    Raises:
        ProfileError: there are no data of it.
    """
    key = "".join(filter(str.isalnum, name)).upper()
    if key not in GPUS:
        raise ProfileError(f"no data of a GPU {name!r}; there are {', '.join(GPUS)}")
    return GPUS[key]
