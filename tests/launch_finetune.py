"""Not a test: `finetune.main` under `accelerate launch` on CPU processes, sharded too (tests/test_equivalence.py)."""

import sys

from accelerate import Accelerator

from asymflow_ft import finetune
from tests.on_cpu import spread_as_on_gpus

if spread_as_on_gpus():
    finetune.Accelerator = lambda cpu, **more: Accelerator(**more)
sys.exit(finetune.main())
