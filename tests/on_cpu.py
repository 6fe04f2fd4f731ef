"""Not a test: FSDP and DeepSpeed on CPU processes, which accelerate allows on GPUs only; torch does it with gloo."""

import importlib
import os

from accelerate import PartialState
from accelerate.utils import DistributedType


def spread_as_on_gpus() -> bool:
    """Believe the launch configuration. True under DeepSpeed, whose Accelerator must not be told `cpu`."""
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if zero or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState(cpu=True)
        layout = DistributedType.DEEPSPEED if zero else DistributedType.MULTI_GPU
        PartialState._shared_state["distributed_type"] = layout
    if zero:
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it, Accelerator would not take the DeepSpeed configuration
        backend = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None  # its own all-reduce for CPUs, which it would compile for a minute
    return zero
