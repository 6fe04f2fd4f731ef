"""The cache of latents and embeddings: nothing stale, nothing half, the same files however it was made."""

import pytest
import torch

from asymflow_ft.data.cache import TensorCache, content_key, rounded


def value(key):
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(int(key[:8], 16)))


KEYS = [content_key(i) for i in range(11)]


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("storage, error", [("float32", 0), ("float16", 1e-3), ("bfloat16", 4e-3), ("fp8", 0.04)])
def test_values_come_back_in_the_storage_they_were_given(storage, error, tmp_path):
    cache = TensorCache(tmp_path, storage, 4)
    shards = cache.missing_shards([*KEYS, *KEYS])
    assert [len(shard) for shard in shards] == [4, 4, 3]
    cache.fill(shards, lambda keys: [value(k) for k in keys], "", show=False)
    again = TensorCache(tmp_path, storage, 4)
    assert not again.missing_shards(KEYS) and not again.damaged()
    for key in KEYS:
        assert torch.equal(again[key], cache[key]) and torch.equal(again[key], rounded(value(key), storage))
        relative = (again[key].float() - value(key)).norm() / value(key).norm()
        assert relative <= error and (error == 0 or relative > error / 30)


def test_interrupted_at_any_shard_and_shared_among_processes_gives_the_same_files(tmp_path):
    def fill(folder, ranks, stop_after=99):
        cache = TensorCache(folder, "float16", 2)
        shards = cache.missing_shards(KEYS)
        for rank in range(ranks):
            for shard in shards[rank::ranks][:stop_after]:
                cache.write(shard, [value(k) for k in shard])

    fill(tmp_path / "whole", 1)
    for done in range(6):
        fill(tmp_path / f"{done}", 1, stop_after=done)
        fill(tmp_path / f"{done}", 1)
        fill(tmp_path / f"two-{done}", 2, stop_after=done // 2)
        fill(tmp_path / f"two-{done}", 3)
        assert files(tmp_path / f"{done}") == files(tmp_path / f"two-{done}") == files(tmp_path / "whole")


def test_damage_is_found(tmp_path):
    cache = TensorCache(tmp_path, "float32", 4)
    cache.fill(cache.missing_shards(KEYS), lambda keys: [value(k) for k in keys], "", show=False)
    first, second, _ = sorted(tmp_path.iterdir())
    content = bytearray(first.read_bytes())
    content[-5] ^= 1
    first.write_bytes(content)
    assert [line.split(": ")[1] for line in TensorCache(tmp_path, "float32", 4).damaged()] == ["the checksum differs"]
    second.write_bytes(second.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"{second.name} is damaged .* delete it and run again"):
        TensorCache(tmp_path, "float32", 4)


def test_values_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(ValueError, match="NaN or infinity"):
        TensorCache(tmp_path, "float16", 4).write(KEYS[:1], [torch.full((2, 2), torch.nan)])
    with pytest.raises(ValueError, match="NaN or infinity"):
        TensorCache(tmp_path, "float16", 4).write(KEYS[:1], [torch.full((2, 2), 1e6)])


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    TensorCache(tmp_path, "fp8", 4).write(KEYS[:2], [value(k)[:2] for k in KEYS[:2]])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for at in range(len(whole)):
        for bit in (1, 32):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            try:
                told = TensorCache(tmp_path, "fp8", 4).damaged()
            except ValueError as error:
                told = [str(error)]
            assert len(told) == 1 and told[0].startswith((f"{file}: ", "the cache file")), (at, told)
