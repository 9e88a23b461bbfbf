"""A folder of features: whatever the moment of a kill, each image is there once or is still to do."""

import contextlib
import errno
import json
import os
import shutil
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qwen2vl_trt.errors import FeaturesError
from qwen2vl_trt.runtime.features import store as feature_store
from qwen2vl_trt.runtime.features.shards import merge_shards, shard_paths
from qwen2vl_trt.runtime.features.store import open_store
from tests.support.feature_files import stored

SETTINGS = {"model": "m", "layer": None}
KEYS = [f"folder/ü{number}.jpg" for number in range(14)]


def tensor(key):
    return torch.full((2 + KEYS.index(key) % 3, 4), float(KEYS.index(key)))


def fill(folder, if_exists="refuse", keys=KEYS, settings=SETTINGS, flush=True):
    with open_store(folder, settings, if_exists, shard_size=4) as store:
        for key in keys:
            if key not in store:
                store.add(key, (1, 2, 4), tensor(key))
        if flush:
            store.flush()
        return store


def assert_whole(folder):
    found = stored(folder)
    assert sorted(found) == sorted(KEYS)
    assert all(torch.equal(found[key], tensor(key)) for key in KEYS)
    index = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert [line["image"] for line in index] == KEYS
    for line in index:
        with safe_open(folder / line["shard"], "pt") as shard:
            assert list(shard.get_slice(line["image"]).get_shape()) == line["shape"]
        assert line["grid"] == [1, 2, 4]
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == [
        *(f"features-{number:05d}.safetensors" for number in range(len(shard_paths(folder)))),
        "index.jsonl",
        "settings.json",
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_write_to_the_disk(tmp_path):
    """A child that ends without cleaning up at its n-th sync or rename, for every n, twice in a row."""
    sync, rename = os.fsync, os.replace
    assert_whole_at = []
    for limit in range(100):
        folder = tmp_path / str(limit)
        for attempt in range(2):
            child = os.fork()
            if not child:
                try:
                    left = [limit]

                    def mortal(call, left=left):
                        def counted(*arguments):
                            if not left[0]:
                                if call is sync:  # what was not synced yet may be lost with the power
                                    with contextlib.suppress(OSError):  # a folder
                                        os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                                os._exit(9)
                            left[0] -= 1
                            return call(*arguments)

                        return counted

                    os.fsync, os.replace = mortal(sync), mortal(rename)
                    fill(folder, "resume")
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code in (0, 9), f"limit {limit}, attempt {attempt}: the run failed"
            if code == 0:
                break
        found = stored(folder) if folder.exists() else {}
        assert sorted(found) == sorted(KEYS[: len(found)]), "an image is missing before one that is there"
        fill(folder, "resume")
        assert_whole(folder)
        assert_whole_at.append(code == 0 and attempt == 0)
        if assert_whole_at[-1]:
            break
    # Four shards, each a sync, a rename, its folder's sync and the index's; the settings and the index before them.
    assert len(assert_whole_at) > 20


def test_what_was_not_flushed_is_done_again(tmp_path):
    fill(tmp_path, keys=KEYS[:7], flush=False)
    assert sorted(stored(tmp_path)) == sorted(KEYS[:4])
    with (tmp_path / "index.jsonl").open("r+") as index:
        index.truncate(30)  # a line that the kill tore
    (tmp_path / ".features-00001.safetensors.tmp").write_bytes(b"torn")
    fill(tmp_path, "resume")
    assert_whole(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in shard_paths(tmp_path)}
    assert fill(tmp_path, "resume").saved == 14
    assert {path: path.stat().st_mtime_ns for path in shard_paths(tmp_path)} == before


def test_a_shard_ends_at_its_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 64)
    fill(tmp_path)
    assert_whole(tmp_path)
    assert len(shard_paths(tmp_path)) > 4


def test_another_run_is_in_the_way(tmp_path):
    fill(tmp_path, keys=KEYS[:5])
    with pytest.raises(FeaturesError, match="--resume goes on with it, --overwrite starts again"):
        fill(tmp_path)
    with pytest.raises(FeaturesError, match="was begun with layer None, this run has 3; give another --output"):
        fill(tmp_path, "resume", settings=SETTINGS | {"layer": 3})
    with pytest.raises(FeaturesError, match="was begun with model 'm', this run has None"):
        fill(tmp_path, "resume", settings={"layer": None})
    (tmp_path / "mine.txt").write_text("not of this command")
    fill(tmp_path, "overwrite", keys=KEYS[2:4], settings=SETTINGS | {"layer": 3})
    assert sorted(stored(tmp_path)) == KEYS[2:4]
    assert (tmp_path / "mine.txt").exists()
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(FeaturesError, match=r"settings\.json cannot be read"):
        fill(tmp_path, "resume")


def test_nothing_saved_is_nothing_in_the_way(tmp_path):
    fill(tmp_path, keys=KEYS[:3], flush=False, settings={"other": 1})
    fill(tmp_path)
    assert_whole(tmp_path)


def test_two_runs_at_once(tmp_path):
    with (
        open_store(tmp_path, SETTINGS),
        pytest.raises(FeaturesError, match="another run is writing there"),
        open_store(tmp_path, SETTINGS, "overwrite"),
    ):
        pass
    fill(tmp_path)  # the lock is free again


@pytest.mark.parametrize("damage", ["cut", "longer", "text", "name"])
def test_a_damaged_shard(tmp_path, damage):
    fill(tmp_path)
    path = shard_paths(tmp_path)[1]
    content = path.read_bytes()
    if damage == "name":
        path = path.rename(tmp_path / "features-last.safetensors")
    else:
        path.write_bytes({"cut": content[:-1], "longer": content + b" ", "text": b"no shard at all"}[damage])
    with pytest.raises(FeaturesError, match=f"{path.name} is (damaged or )?no"):
        fill(tmp_path, "resume")
    path.unlink()
    fill(tmp_path, "resume")
    assert sorted(stored(tmp_path)) == sorted(KEYS)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, to know which file is synced")
def test_a_shard_that_does_not_read_back_does_not_count(tmp_path, monkeypatch):
    """As on a disk that loses or changes what was written to it."""
    sync = os.fsync
    for number, damage in enumerate(("cut", "header", "shape")):

        def fsync(descriptor, damage=damage):
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if ".features-00001" in path.name:
                content = path.read_bytes()
                damaged = {"cut": content[:-1], "header": content.replace(b"{", b"?", 1)}
                path.write_bytes(damaged.get(damage, content.replace(b"[3,4]", b"[4,3]", 1)))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        folder = tmp_path / str(number)
        with pytest.raises(
            FeaturesError, match=r"features-00001.* cannot be written: it does not read back .*; 4 images"
        ):
            fill(folder)
        assert sorted(stored(folder)) == sorted(KEYS[:4])
        monkeypatch.undo()
        fill(folder, "resume")
        assert_whole(folder)


def test_names_fill_a_header_before_the_images_fill_the_shard(tmp_path, monkeypatch):
    """Readers take 100 MB of it: a hundred thousand long names."""
    monkeypatch.setattr(feature_store, "LARGEST_HEADER", 2_000_000)
    keys = [f"{number}{'😀' * 1000}\x01" for number in range(80)]
    with open_store(tmp_path, SETTINGS) as store:
        for key in keys:
            store.add(key, (1, 2, 4), torch.zeros(1))
        store.flush()
    assert sorted(stored(tmp_path)) == sorted(keys)
    assert len(shard_paths(tmp_path)) > 1
    lengths = [struct.unpack("<Q", path.read_bytes()[:8])[0] for path in shard_paths(tmp_path)]
    assert lengths[0] > 100_000
    assert max(lengths) < 2_000_000


def test_one_key_in_two_shards_is_no_file(tmp_path):
    fill(tmp_path / "parts")
    shutil.copyfile(shard_paths(tmp_path / "parts")[0], tmp_path / "parts" / "features-00009.safetensors")
    with pytest.raises(FeaturesError, match=r"features-00009\.safetensors: folder/.* is in an earlier shard too"):
        merge_shards(tmp_path / "parts", tmp_path / "all.safetensors")
    assert not (tmp_path / "all.safetensors").exists()


def test_errors_are_those_of_the_latest_run(tmp_path):
    with open_store(tmp_path, SETTINGS) as store:
        store.fail("bad\udcff.jpg", "truncated")
        store.add(KEYS[0], (1, 2, 4), tensor(KEYS[0]))
        store.flush()
        assert (store.failed, store.first_failure) == (1, "truncated")
    assert [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()] == [
        {"image": "bad\\udcff.jpg", "error": "truncated"}  # valid Unicode: other readers of JSON refuse the rest
    ]
    fill(tmp_path, "resume")
    assert_whole(tmp_path)  # without errors.jsonl


def test_one_file_from_shards(tmp_path):
    fill(tmp_path / "parts")
    merge_shards(tmp_path / "parts", tmp_path / "all.safetensors")
    found = load_file(tmp_path / "all.safetensors")
    assert sorted(found) == sorted(KEYS)
    assert all(torch.equal(found[key], tensor(key)) for key in KEYS)
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert list(json.loads(file.metadata()["grids"])) == KEYS
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "all.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_disk_that_fills_up_at_every_write(tmp_path, monkeypatch):
    """The n-th sync fails, for every n: one named error, nothing half-written, and a resume completes the rest."""
    sync, left = os.fsync, [0]

    def failing(descriptor):
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    for limit in range(100):
        folder, left[0] = tmp_path / str(limit), limit
        with contextlib.suppress(FeaturesError):
            fill(folder)
            break
        left[0] = 100
        assert not list(folder.glob(".features*")), "a temporary file is left"
        fill(folder, "resume")
        assert_whole(folder)
    assert limit > 10
    left[0] = 7
    with pytest.raises(
        FeaturesError, match=r"^\S*features-00001\S* cannot be written: No space left on device; 4 images"
    ):
        fill(tmp_path / "message")


def test_a_shard_is_written_while_the_next_is_filled(tmp_path, monkeypatch):
    """The second shard waits for the first to be on the disk; what is in memory is never more than both."""
    sync, disk, added = os.fsync, threading.Event(), []

    def add(store):
        for key in KEYS:
            store.add(key, (1, 2, 4), tensor(key))
            added.append(key)

    with open_store(tmp_path, SETTINGS, shard_size=4) as store:
        monkeypatch.setattr(os, "fsync", lambda descriptor: (disk.wait(60), sync(descriptor)))
        filling = threading.Thread(target=add, args=[store])
        filling.start()
        while len(added) < 7:  # all but the one that ends the second shard
            time.sleep(0.001)
        filling.join(0.1)
        assert filling.is_alive()
        assert len(added) == 7
        assert (store.saved, stored(tmp_path)) == (0, {})  # nothing is said to be done before it is on the disk
        disk.set()
        filling.join(60)
        store.flush()
        assert store.saved == 14
    assert_whole(tmp_path)


def test_an_error_of_the_disk_ends_the_run_at_the_next_shard(tmp_path, monkeypatch):
    with open_store(tmp_path, SETTINGS, shard_size=4) as store:
        monkeypatch.setattr(os, "fsync", lambda descriptor: os.write(-1, b""))
        for key in KEYS[:7]:
            store.add(key, (1, 2, 4), tensor(key))
        for _ in range(2):  # and again, whatever is asked of the store
            with pytest.raises(
                FeaturesError, match=r"features-00000.* cannot be written: Bad file descriptor; 0 images"
            ):
                store.add(KEYS[7], (1, 2, 4), tensor(KEYS[7]))
        with pytest.raises(FeaturesError, match="cannot be written"):
            store.flush()
    assert not stored(tmp_path)
    monkeypatch.undo()
    fill(tmp_path, "resume")
    assert_whole(tmp_path)
