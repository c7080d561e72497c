"""Checkpoints prove themselves: whatever happens to their files, they load as they were written, or are refused."""

import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_jax import random_params, tiny_config, write_run_inputs
from jax.sharding import NamedSharding, PartitionSpec

from r1vl_jax.checkpoint.checksums import checksums
from r1vl_jax.checkpoint.folder import SUMS, verify_folder
from r1vl_jax.checkpoint.hf import load_hf, save_hf
from r1vl_jax.checkpoint.state import LAYOUT, StageCheckpoints, sealed
from r1vl_jax.checkpoint.store import find_model, load_model, save_params
from r1vl_jax.common import files
from r1vl_jax.errors import CheckpointError
from r1vl_jax.inference.open_model import open_model
from r1vl_jax.model.config import load_config
from r1vl_jax.parallel.sharding import make_mesh
from r1vl_jax.types import TrainState

# Reads of damaged files that orbax gave up may still say so when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

POSITION = {"rows": 7, "dropped": [], "fingerprint": "f"}


def state_of(step):
    keys = jax.random.split(jax.random.key(step), 3)
    params = {"a": jax.random.normal(keys[0], (40, 30)), "b": [jax.random.normal(keys[1], (300,)), jnp.zeros((9, 2))]}
    return TrainState(jnp.int32(step), params, {"mu": jax.tree.map(jnp.sin, params), "count": jnp.int32(3 * step)})


LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(1))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A stage with the states of steps 2, 4 and 6, of which two are kept."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "sft"
    checkpoints = StageCheckpoints(folder, 2)
    for step in (2, 4, 6):
        checkpoints.save(step, state_of(step), POSITION | {"rows": step})
    checkpoints.close()
    return folder


def restored(folder, said=None):
    checkpoints = StageCheckpoints(folder, 2, (said if said is not None else []).append)
    try:
        return checkpoints.restore(LIKE)
    finally:
        checkpoints.close()


def same(found, step):
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), found.state, state_of(step))
    return found.step == step and all(jax.tree.leaves(equal)) and found.position == POSITION | {"rows": step}


# Checksums.


def test_every_change_of_an_array_changes_its_checksum():
    x = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    changed = [x.copy() for _ in range(4)]
    changed[0].view(np.uint32)[4, 6, 2] ^= 1  # one bit
    changed[1].view(np.uint32)[0, 0, 0] ^= 1 << 31
    changed[2][[0, 1]] = changed[2][[1, 0]]  # the same values in another order
    changed[3] = x.reshape(5, 3, 7)[:, :, ::-1].reshape(x.shape)
    arrays = [x, *changed, x.astype(jnp.bfloat16), x > 0, np.zeros((3, 4), np.float32), np.zeros(13, np.float32)]
    sums = [checksums(array)[""] for array in arrays]
    assert len(set(sums)) == len(sums) and all(len(text) == 16 for text in sums)
    assert checksums({"x": x, "y": [x]}) == {"['x']": sums[0], "['y'][0]": sums[0]}
    assert checksums(np.zeros(0, np.float32)) == checksums(np.zeros((2, 0), np.float32))


def test_bits_that_are_not_numbers_count_too():
    """Two NaNs with different bits, and 0 and -0, compare equal or never; their checksums do not."""
    x = np.array([0x7FC00000, 0, 5], np.uint32)
    other = np.array([0x7FC00001, 0x80000000, 5], np.uint32)
    sums = {checksums(array.view(np.float32))[""] for array in (x, other)}
    assert len(sums) == 2 and checksums(x.view(np.float32))[""] in sums


def test_checksums_do_not_depend_on_the_mesh():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    x = jax.random.normal(jax.random.key(0), (8, 16, 4))
    axes = mesh.axis_names
    for spec in (PartitionSpec(), PartitionSpec(axes[0]), PartitionSpec(axes[2], axes[1]), PartitionSpec(axes)):
        assert checksums(jax.device_put(x, NamedSharding(mesh, spec))) == checksums(x)


# Train states.


def test_the_newest_states_are_kept_and_restored(written):
    assert sorted(path.name for path in written.glob("[0-9]*")) == ["4", "6"]
    assert same(restored(written), 6)
    host = json.loads((written / "6" / "host" / "metadata").read_text())
    assert host["layout"] == LAYOUT and host["checksums"] == checksums(state_of(6))


def corrupted(folder: Path, rng: random.Random) -> str:
    """Does something to one file below a folder. Returns what."""
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    data = bytearray(file.read_bytes())
    size = len(data)
    place = rng.randrange(size) if size else 0
    kind = rng.choice(["bit", "byte", "bits", "zeros", "cut", "empty", "gone", "longer", "shifted", "noise", "swapped"])
    if kind == "gone":
        file.unlink()
        return f"{file}: gone"
    if kind == "swapped":
        other = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        data, more = bytearray(other.read_bytes()), bytes(data)
        other.write_bytes(more)
    elif kind == "bit" and size:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "byte" and size:
        data[place] = rng.randrange(256)
    elif kind == "bits":
        for _ in range(min(size, 8)):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    elif kind == "cut":
        del data[place:]
    elif kind == "empty":
        data.clear()
    elif kind == "longer":
        data += rng.randbytes(16)
    elif kind == "shifted":
        data[place:place] = b"\x00"
    else:
        data[place : place + 32] = rng.randbytes(len(data[place : place + 32]))
    file.write_bytes(bytes(data))
    return f"{file}: {kind} at {place} of {size}"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 25))])
def test_a_corrupted_state_is_never_restored(written, tmp_path, seed):
    """40 corruptions of the newest state: what is restored is that state or the one before, bit for bit."""
    fell_back = 0
    for number in range(40):
        folder = tmp_path / str(number) / "checkpoints" / "sft"
        shutil.copytree(written, folder)
        rng = random.Random(1000 * seed + number)
        what, said = corrupted(folder / "6", rng), []
        found = restored(folder, said)
        assert found is not None and same(found, found.step) and found.step in (4, 6), what
        if found.step == 4:
            fell_back += 1
            assert len(said) == 1 and str(folder / "6") in said[0] and "damaged, not used, moved to" in said[0], what
            assert (folder.parent / "damaged" / "sft-6").is_dir() and not (folder / "6").exists()
        shutil.rmtree(tmp_path / str(number))
    assert fell_back >= 3  # the others changed nothing that is read, such as a second copy of an index


def test_without_any_good_state_all_are_named_and_none_is_moved(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "sft")
    for step in ("4", "6"):
        host = folder / step / "host" / "metadata"
        host.write_text(host.read_text().replace('"rows": ', '"rows": 1'))
    with pytest.raises(CheckpointError, match=r"no train state can be used: .*/6 \(.*\), .*/4 \(.*differs from what"):
        restored(folder)
    assert (folder / "6").is_dir() and not (tmp_path / "damaged").exists()


def test_a_state_after_a_damaged_one_is_written_and_the_good_one_kept(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "checkpoints" / "sft")
    corrupt = next((folder / "6" / "state" / "d").glob("*"))
    corrupt.write_bytes(corrupt.read_bytes()[:-9])
    checkpoints = StageCheckpoints(folder, 2, [].append)
    assert checkpoints.restore(LIKE).step == 4 and checkpoints.latest == 4
    checkpoints.save(6, state_of(6), POSITION | {"rows": 6})
    checkpoints.close()
    assert sorted(path.name for path in folder.glob("[0-9]*")) == ["4", "6"] and same(restored(folder), 6)


def test_states_of_other_layouts(written, tmp_path):
    """Those of layout 1 have no checksums and are loaded; those of a later one are refused by number."""
    folder = shutil.copytree(written, tmp_path / "old")
    shutil.rmtree(folder / "4")
    host = folder / "6" / "host" / "metadata"
    content = json.loads(host.read_text())
    host.write_text(json.dumps(content["position"]))
    said = []
    assert same(restored(folder, said), 6) and "without checksums" in said[0]
    later = {key: value for key, value in content.items() if key != "digest"} | {"layout": 9}
    host.write_text(json.dumps(sealed(later)))
    with pytest.raises(CheckpointError, match="has layout 9; this version reads 1 to 2"):
        restored(folder)


def test_a_full_disk_while_writing(written, tmp_path, monkeypatch):
    """The save is refused by name, and the states before are all there."""
    folder = shutil.copytree(written, tmp_path / "sft")
    checkpoints = StageCheckpoints(folder, 1)

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("r1vl_jax.checkpoint.state.sync", full)
    checkpoints.save(8, state_of(8), POSITION)
    with pytest.raises(CheckpointError, match=r"sft/8: cannot be written \(.*No space left on device"):
        checkpoints.close()
    assert {"4", "6"} <= {path.name for path in folder.glob("[0-9]*")}


# Folders: exports and converted checkpoints.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


def copied(folder, target):
    return shutil.copytree(folder, target)


@pytest.mark.parametrize("kind", ["export", "converted"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 13))])
def test_a_corrupted_folder_is_never_loaded(inputs, tmp_path, kind, seed):
    """Files of the model and of its weights alike; a change of a file that is not listed does no harm."""
    cfg = load_config(inputs / "model")
    params = load_hf(inputs / "model", cfg)
    good = tmp_path / "good"
    if kind == "export":
        save_hf(params, cfg, good, source=inputs / "model", max_shard_bytes=20_000)
    else:
        save_params(good, params, inputs / "model")
    expected = jax.tree.leaves(load_model(good)[0])
    refusals = 0
    for number in range(40):
        bad = copied(good, tmp_path / str(number))
        what = corrupted(bad, random.Random(1000 * seed + number))
        try:
            open_model(bad, dtype="float32")
            loaded, loaded_cfg, _ = load_model(bad)
        except CheckpointError as error:
            refusals += 1
            assert str(bad) in str(error) and "\n" not in str(error), what
        else:
            assert all(map(np.array_equal, jax.tree.leaves(loaded), expected)) and loaded_cfg == cfg, what
        shutil.rmtree(bad)
    assert refusals >= 25


def test_sums_are_those_of_sha256sum(inputs, tmp_path):
    cfg = load_config(inputs / "model")
    save_hf(load_hf(inputs / "model", cfg), cfg, tmp_path / "out", source=inputs / "model")
    lines = [line.split("  ") for line in (tmp_path / "out" / SUMS).read_text().splitlines()]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name for _, name in lines} == names - {SUMS} and all(len(digest) == 64 for digest, _ in lines)
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"config.json: not the file that was written; .* then remove {SUMS}"):
        open_model(tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json: cannot be read"):
        verify_folder(tmp_path / "out", weights=False)
    (tmp_path / "out" / SUMS).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=f"{SUMS}: cannot be read"):
        verify_folder(tmp_path / "out", weights=False)
    for name in ("a\0b", "../model/config.json", "/dev/zero", "\x1b[2J"):
        (tmp_path / "out" / SUMS).write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(CheckpointError, match=f"{SUMS}: names .*, expected files of the folder"):
            verify_folder(tmp_path / "out", weights=True)
    (tmp_path / "out" / SUMS).unlink()
    verify_folder(tmp_path / "out", weights=True)


def test_the_state_of_a_run_is_verified_by_other_commands(inputs, tmp_path):
    """`generate` and `convert` read the parameters of a run that has not finished; a state can be named by itself."""
    cfg = tiny_config()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{path: {inputs / 'model'}}}\n")
    cfg = load_config(inputs / "model")
    params = random_params(cfg)
    checkpoints = StageCheckpoints(tmp_path / "run" / "checkpoints" / "sft", 2)
    scaled = [jax.tree.map(lambda x, step=step: x * step, params) for step in range(3)]
    for step in (1, 2):
        checkpoints.save(step, TrainState(jnp.int32(step), scaled[step], {}), POSITION)
    checkpoints.close()
    states = tmp_path / "run" / "checkpoints" / "sft"
    for folder, step in ((tmp_path / "run", 2), (states / "1", 1)):
        loaded = load_model(folder)[0]
        assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(scaled[step])))
    host = states / "2" / "host" / "metadata"
    content = json.loads(host.read_text())
    name = next(name for name in content["checksums"] if name.startswith(".params"))
    rest = {key: value for key, value in content.items() if key != "digest"}
    rest["checksums"][name] = "0" * 16
    host.write_text(json.dumps(sealed(rest)))
    with pytest.raises(
        CheckpointError, match=r"sft/2/state: arrays differ from what was written: .*other states are 1 in"
    ):
        load_model(tmp_path / "run")
    host.unlink()
    with pytest.raises(CheckpointError, match="host/metadata: cannot be read"):
        load_model(find_model(states / "2"))


def test_synced_files_and_folders(tmp_path, monkeypatch):
    synced = []
    fsync = files.os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    files.sync(tmp_path / "a")
    assert len(synced) == 4  # b, c, a, and the folder that has a
