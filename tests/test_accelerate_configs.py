"""The shipped launch configurations, read by accelerate itself."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from tests.conftest import REPOSITORY

KINDS = {
    "single_gpu": (DistributedType.NO, 1, 1), "8_gpus": (DistributedType.MULTI_GPU, 8, 1),
    "multi_node": (DistributedType.MULTI_GPU, 16, 2), "fsdp2": (DistributedType.FSDP, 8, 1),
    "deepspeed": (DistributedType.DEEPSPEED, 8, 1),
    "cpu": (DistributedType.MULTI_GPU, 2, 1),
}  # fmt: skip
FOLDER = REPOSITORY / "recipes/accelerate"


def test_all_files_are_listed():
    assert {file.stem for file in FOLDER.iterdir()} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.num_machines) == KINDS[name]
    assert config.mixed_precision == "no"
    assert config.use_cpu == (name == "cpu")
    header = (FOLDER / f"{name}.yaml").read_text()
    assert f"accelerate launch --config_file recipes/accelerate/{name}.yaml" in header
