"""Memory, of a GPU or the machine: whether it is full, and freeing it."""

import gc

import torch


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory_is_full(error: Exception) -> bool:
    """Whether this says that there is too little memory: a GPU's libraries have errors of their own for it, and for
    the machine's torch has texts alone, of its allocator and of memory that processes share."""
    texts = (
        "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "out of memory", "DefaultCPUAllocator: ",
        "Cannot allocate memory",
    )  # fmt: skip
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
