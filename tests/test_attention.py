"""DIFFUSERS_ATTN_BACKEND: said at once when it cannot be used, and otherwise what computes the attention."""

import pytest
from diffusers.models import attention_dispatch
from huggingface_hub.errors import HTTPError

from asymflow_ft import cli, finetune
from asymflow_ft.components.attention import VARIABLE, prepare_attention
from tests.conftest import REPOSITORY

RECIPE = str(REPOSITORY / "recipes/tiny/finetune.yaml")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    registry = attention_dispatch._AttentionBackendRegistry
    before, _ = registry.get_active_backend()
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    prepare_attention.cache_clear()
    yield
    registry.set_active_backend(before)
    prepare_attention.cache_clear()


@pytest.mark.parametrize(
    "command", [["bench", "sample"], ["finetune", RECIPE, "--dry-run"]], ids=["bench", "finetune"]
)
def test_a_backend_without_its_package_is_said_at_once(command, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "flash")
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert "DIFFUSERS_ATTN_BACKEND=flash cannot be used" in error and "install `flash-attn" in error


def test_the_launched_program_says_it_too(monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "flash")
    assert finetune.main([RECIPE]) == 1
    assert "DIFFUSERS_ATTN_BACKEND=flash cannot be used" in capsys.readouterr().err


def test_a_kernel_of_the_hub_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(attention_dispatch, "_check_attention_backend_requirements", lambda backend: None)
    monkeypatch.setattr(
        attention_dispatch, "_maybe_download_kernel_for_backend", lambda backend: asked.append(backend.value)
    )
    monkeypatch.setenv(VARIABLE, "flash_hub")
    prepare_attention()
    assert asked == ["flash_hub"]


@pytest.mark.parametrize("name", [None, "_native_math"])
def test_one_that_works_is_used(name, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    if name is not None:
        monkeypatch.setenv(VARIABLE, name)
    prepare_attention()
    backend, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    assert backend.value == (name or "native")


def test_a_hub_that_does_not_answer_is_said(monkeypatch):
    def fetch(backend):
        raise HTTPError("no route to the Hub")

    monkeypatch.setattr(attention_dispatch, "_check_attention_backend_requirements", lambda backend: None)
    monkeypatch.setattr(attention_dispatch, "_maybe_download_kernel_for_backend", fetch)
    monkeypatch.setenv(VARIABLE, "flash_hub")
    with pytest.raises(ValueError, match="flash_hub cannot be used: no route to the Hub"):
        prepare_attention()


def test_commands_that_run_no_network_do_not_ask(monkeypatch):
    monkeypatch.setenv(VARIABLE, "flash")
    assert cli.main(["families"]) == 0
