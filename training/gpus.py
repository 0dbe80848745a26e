"""GPUs that the plan knows: their memory, and the rates of their matrix products and of the links between them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    devices: tuple[str, ...]  # names that torch.cuda.get_device_name gives
    memory_gib: float  # that torch reports, less than the data sheet's
    tflops: float  # rate of a large bfloat16 matrix product
    link: float = 32e9  # bytes per second to another GPU of its node, in each direction: PCIe 4.0 with 16 lanes
    measured: bool = False  # tflops
    has_fp8: bool = True  # FP8 products


# NVLink in one direction, half of what data sheets give for both: 900 GB/s (H100 and H200, SXM), 600 GB/s (A100, SXM)
HOPPER_NVLINK, AMPERE_NVLINK = 450e9, 300e9
OF_DATA_SHEET = 804 / 989  # measured on an H100, over the dense bfloat16 rate of its data sheet
GPUS = {
    "h100": Gpu(("NVIDIA H100 80GB HBM3",), 79.1, 804, HOPPER_NVLINK, measured=True),
    "h200": Gpu(("NVIDIA H200",), 139.7, 801, HOPPER_NVLINK, measured=True),
    "a100-80": Gpu(
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 79.1, 312 * OF_DATA_SHEET, AMPERE_NVLINK, has_fp8=False
    ),
    "a100-40": Gpu(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 39.4, 312 * OF_DATA_SHEET, AMPERE_NVLINK, has_fp8=False
    ),
    "l40s": Gpu(("NVIDIA L40S",), 44.4, 362 * OF_DATA_SHEET),
    "rtx4090": Gpu(("NVIDIA GeForce RTX 4090",), 23.5, 165 * OF_DATA_SHEET),
    "rtx4080": Gpu(("NVIDIA GeForce RTX 4080",), 15.6, 97.5 * OF_DATA_SHEET),
    "rtx4070": Gpu(("NVIDIA GeForce RTX 4070",), 11.6, 58.3 * OF_DATA_SHEET),
    "rtx4060": Gpu(("NVIDIA GeForce RTX 4060",), 7.6, 30.2 * OF_DATA_SHEET),
}
