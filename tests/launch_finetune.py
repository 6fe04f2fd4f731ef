"""Not a test: `finetune.main` under `accelerate launch` on CPU processes, sharded too (tests/test_equivalence.py)."""

import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from asymflow_ft import finetune

if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # accelerate allows FSDP on GPUs only; torch does it with gloo
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
sys.exit(finetune.main())
