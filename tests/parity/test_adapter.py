"""Adapter files, written and read: case 12."""

from pathlib import Path

import pytest
import torch

from asymflow_ft.components.subspace import Cond, PixelModel, PixelSubspace
from asymflow_ft.families import flux2
from asymflow_ft.hub.official import (
    adapter_config,
    adapter_subspace,
    apply_adapter,
    load_adapter,
    save_adapter,
    subspace_buffers,
    trained_tensors,
)
from tests.parity.conftest import (
    close,
    image_velocity,
    load_base,
    read,
    read_config,
)


def test_case_12_export(golden: Path, tmp_path: Path) -> None:
    trained, lifted = read(golden, "export_train_state"), read(golden, "transformer_lifted")
    base, config = load_base(golden), read_config(golden, "export/config.json")
    subspace = PixelSubspace.from_fit(lifted["proj_buffer"], lifted["scale_buffer"])
    state = trained_tensors(trained) | subspace_buffers(subspace)
    save_adapter(tmp_path, state, adapter_config(flux2, base.config, subspace, config["sigma_min"]))

    assert read_config(tmp_path, "config.json") == config
    expected = read(golden, "export/diffusion_pytorch_model")
    written = read(tmp_path, "diffusion_pytorch_model")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype, f"{name}: {tensor.dtype}, expected {expected[name].dtype}"
        close(tensor, expected[name], name)
        assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), f"{name}: bits differ"

    adapted = {name.split(".lora_")[0] for name in trained if ".lora_" in name}
    assert adapted == set(flux2.lora_targets(base))
    assert {name.removesuffix(".weight") for name in trained if ".lora_" not in name} == set(flux2.TRAINED_ENDS)


def test_case_12_import(golden: Path) -> None:
    expected, base = read(golden, "export_fused"), load_base(golden)
    state, _, _ = load_adapter(golden / "export")
    fused, subspace = apply_adapter(flux2, base, state), adapter_subspace(state)
    close(subspace.basis, expected.pop("proj_buffer"), "proj_buffer", abs=1e-6)
    close(subspace.scale, expected.pop("scale_buffer"), "scale_buffer", abs=1e-6)
    weights, unchanged = fused.state_dict(), base.state_dict()
    assert expected.keys() <= weights.keys() == unchanged.keys()
    for name, tensor in weights.items():
        if name in expected:
            close(tensor, expected[name], name, abs=1e-6)
        else:
            close(tensor, unchanged[name], name)


@torch.no_grad()
@pytest.mark.parametrize("fuse", [True, False])
def test_case_12_forward(golden: Path, fuse: bool) -> None:
    data, (state, config, _) = read(golden, "export_forward"), load_adapter(golden / "export")
    transformer, subspace = apply_adapter(flux2, load_base(golden), state, fuse=fuse), adapter_subspace(state)
    model, cond = PixelModel(transformer, subspace, flux2.predict), Cond(data["encoder_hidden_states"])
    name = "velocity_fused" if fuse else "velocity_unfused"
    close(image_velocity(model, data["x_t"], data["sigma"], cond, config["sigma_min"]), data[name], name, rel=5e-5)
