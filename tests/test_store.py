"""Kernels on disk: what is read is what `kernel_fn` returns, whatever happens on the way."""

import concurrent.futures
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
from neural_tangents import stax
from nt_core.store import DamagedTiles, MissingTiles, plan

pytestmark = pytest.mark.unoptimised

RANDOM = np.random.default_rng(0)
X1, X2 = RANDOM.normal(size=(11, 5)).astype("float32"), RANDOM.normal(size=(7, 5)).astype("float32")
IMAGES = RANDOM.normal(size=(5, 3, 2, 2)).astype("float32")
FCN = stax.serial(stax.Dense(8), stax.Relu(), stax.Dense(1, 1.5, 0.1))
CNN = stax.serial(stax.Conv(8, (2, 2), padding="SAME"), stax.Relu())
ROUNDING = 1e-6  # of another block of samples


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=ROUNDING, atol=ROUNDING * np.abs(expected).max())


def computed(path, *args, **kwargs):
    store = nt.KernelStore.create(path, *args, **kwargs)
    store.compute()
    return store


BATCHES = [(FCN, (X1, X2)), (FCN, (X1, None)), (CNN, (IMAGES, IMAGES[:3])), (CNN, (IMAGES, None))]


@pytest.mark.parametrize("network, batches", BATCHES)
@pytest.mark.parametrize("tile", [3, 100])
def test_is_the_kernel(tmp_path, network, batches, tile):
    kernel_fn = network[2]
    store = computed(tmp_path / "store", kernel_fn, *batches, tile=tile)
    expected = kernel_fn(*batches, ("nngp", "ntk"))
    for name in ("nngp", "ntk"):
        matrix = getattr(nt.KernelStore(tmp_path / "store"), name)
        assert matrix.shape == getattr(expected, name).shape and matrix.dtype == np.float32
        close(np.asarray(matrix), getattr(expected, name))
        if batches[1] is None and matrix.ndim == 2:
            np.testing.assert_array_equal(matrix[:], matrix[:].T)
    assert store.status().done == store.status().total


def test_double_precision(tmp_path):
    with jax.enable_x64(True):
        x = X1.astype("float64")
        store = computed(tmp_path / "store", FCN[2], x, get="ntk", tile=4)
        np.testing.assert_allclose(store.ntk[:], FCN[2](x, None, "ntk"), rtol=1e-13)
    assert store.ntk.dtype == np.float64
    with pytest.raises(AttributeError, match="has ntk only"):
        store.nngp  # noqa: B018


KEYS = [3, -1, slice(2, 9), (slice(None, None, -2), 4), (2, 3), ([5, 0, 5], slice(1, 3)), (slice(None), X1[:, 0] > 0)]


@pytest.mark.parametrize("key", [*KEYS, ..., (..., 1), slice(4, 4)], ids=str)
def test_indexing(tmp_path, key):
    """As of an array of NumPy, but for two arrays, which choose rows and columns."""
    store = computed(tmp_path / "store", FCN[2], X1, get="ntk", tile=4)
    np.testing.assert_array_equal(store.ntk[key], store.ntk[:][key])


def test_indexing_by_two_arrays_and_further_axes(tmp_path):
    store = computed(tmp_path / "store", CNN[2], IMAGES, get="ntk", tile=2)
    whole = store.ntk[:]
    np.testing.assert_array_equal(store.ntk[[3, 1], [0, 4], 1:, 0], whole[np.ix_([3, 1], [0, 4])][:, :, 1:, 0])
    assert len(store.ntk) == 5
    for wrong in (5, (0, 0, 0, 0, 0, 0, 0), [[0]]):
        with pytest.raises(IndexError):
            store.ntk[wrong]
    with pytest.raises(ValueError, match="copy"):
        np.asarray(store.ntk, copy=False)


def test_goes_on_where_it_was(tmp_path):
    """What is on disk is not computed again; what is not there is no number."""
    store = computed(tmp_path / "store", FCN[2], X1, X2, tile=4)
    files = {tile: tmp_path / "store" / "ntk" / store.grid.key(tile) for tile in store.grid.cells()}
    whole = store.ntk[:]
    files[1, 1].unlink()
    assert store.missing() == [(1, 1)] and store.status().done == 5
    with pytest.raises(MissingTiles, match=r"\(1, 1\)"):
        store.ntk[4, 4]
    np.testing.assert_array_equal(store.ntk[4, :4], whole[4, :4])
    written = {tile: file.stat().st_mtime_ns for tile, file in files.items() if tile != (1, 1)}
    again = nt.KernelStore.create(tmp_path / "store", FCN[2], X1, X2, tile=4)
    again.compute()
    np.testing.assert_array_equal(again.ntk[:], whole)
    assert written == {tile: file.stat().st_mtime_ns for tile, file in files.items() if tile != (1, 1)}
    again.compute()  # nothing to do


OTHERS = {
    "network": {"kernel_fn": stax.serial(stax.Dense(8), stax.Erf(), stax.Dense(1, 1.5, 0.1))[2]},
    "network: the": {"kernel_fn": stax.serial(stax.Dense(8), stax.Relu(), stax.Dense(1, 1.5, 0.1001))[2]},
    "x1": {"x1": X1 + np.float32(1e-6)},
    "symmetric": {"x2": X1},
    "get": {"get": "ntk"},
    "tile: the store has 4, given was 5": {"tile": 5},
    "samples": {"x1": X1[:10]},
    "arguments": {"mask_constant": 3.0},
}


@pytest.mark.parametrize("difference", OTHERS)
def test_refuses_another_kernel(tmp_path, difference):
    same = {"kernel_fn": FCN[2], "x1": X1, "tile": 4}
    nt.KernelStore.create(tmp_path / "store", **same)
    with pytest.raises(ValueError, match=f"is of another kernel(.|\n)*{difference}"):
        nt.KernelStore.create(tmp_path / "store", **(same | OTHERS[difference]))
    nt.KernelStore.create(tmp_path / "store", **same)


def test_functions_that_are_no_networks_are_known_by_their_values(tmp_path):
    def linear(scale):
        return lambda x1, x2: scale * x1 @ (x1 if x2 is None else x2).T

    store = computed(tmp_path / "store", linear(1.0), X1, get="ntk", tile=4)
    close(store.ntk[:], X1 @ X1.T)
    with pytest.raises(ValueError, match="ntk of two samples"):
        nt.KernelStore.create(tmp_path / "store", linear(1.01), X1, get="ntk", tile=4)


def test_functions_of_the_user_in_networks(tmp_path):
    """Known by names and by values of the kernel, not by where functions are in memory: that is elsewhere next time."""

    def network(scale):
        return stax.serial(stax.Dense(8), stax.Elementwise(lambda x: scale * jnp.tanh(x)), stax.Dense(1))[2]

    computed(tmp_path / "store", network(1.0), X1, tile=4)
    assert not nt.KernelStore.create(tmp_path / "store", network(1.0), X1, tile=4).missing()
    with pytest.raises(ValueError, match="the kernel function: nngp of two samples"):
        nt.KernelStore.create(tmp_path / "store", network(1.01), X1, tile=4)


def test_empirical_kernels(tmp_path):
    init_fn, apply_fn, _ = FCN
    _, params = init_fn(jax.random.key(0), X1.shape)
    kernel_fn = nt.empirical_kernel_fn(apply_fn)
    store = computed(tmp_path / "store", kernel_fn, X1, X2, params=params, tile=4)
    close(store.ntk[:], kernel_fn(X1, X2, "ntk", params))
    other = jax.tree.map(lambda p: p + 1, params)
    with pytest.raises(ValueError, match="arguments"):
        nt.KernelStore.create(tmp_path / "store", kernel_fn, X1, X2, params=other, tile=4)


@pytest.mark.parametrize("damage", ["truncated", "changed", "emptied"])
def test_damage_is_found_and_never_served(tmp_path, damage):
    store = computed(tmp_path / "store", FCN[2], X1, tile=4)
    whole, file = store.ntk[:], tmp_path / "store" / "ntk" / "c" / "0" / "1"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes({"truncated": content[:20], "changed": bytes(content), "emptied": b""}[damage])
    with pytest.raises(DamagedTiles, match="verify"):
        store.ntk[5, 1]
    np.testing.assert_array_equal(store.ntk[8:], whole[8:])
    assert store.verify() == [(0, 1)] and store.verify() == []
    store.compute()
    np.testing.assert_array_equal(store.ntk[:], whole)


def test_other_libraries_read_it(tmp_path):
    import zarr

    store = computed(tmp_path / "store", FCN[2], X1, X2, tile=4)
    np.testing.assert_array_equal(zarr.open_group(str(tmp_path / "store"), mode="r")["ntk"][:], store.ntk[:])


def test_full_disk(tmp_path):
    """What is there stays, the error says what to do, and when there is room again it goes on."""
    store = nt.KernelStore.create(tmp_path / "store", FCN[2], X1, tile=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        with pytest.raises(OSError, match="Make room"):
            store.compute()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.status().done == 0
    store.compute()
    close(store.ntk[:], FCN[2](X1, None, "ntk"))


def test_folder_that_cannot_be_written(tmp_path):
    store = nt.KernelStore.create(tmp_path / "store", FCN[2], X1, tile=4)
    (tmp_path / "store" / "ntk" / "c").write_text("in the way of a folder")
    with pytest.raises(OSError, match="could not be written"):
        store.compute()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "zarr.json").write_text(json.dumps({"attributes": {}}))
    with pytest.raises(ValueError, match="something else"):
        nt.KernelStore.create(tmp_path / "other", FCN[2], X1)


def test_bad_arguments(tmp_path):
    for error, arguments in (
        (ValueError, {"x1": X1, "tile": 0}),
        (ValueError, {"x1": X1[:0]}),
        (KeyError, {"x1": X1, "get": "cov1"}),
        (TypeError, {"x1": FCN[2](X1)}),
    ):
        with pytest.raises(error):
            nt.KernelStore.create(tmp_path / "store", FCN[2], **arguments)
    with pytest.raises(FileNotFoundError, match="create"):
        nt.KernelStore(tmp_path / "nothing")
    store = nt.KernelStore.create(tmp_path / "store", FCN[2], X1)
    with pytest.raises(ValueError, match="process"):
        store.compute(process=2, of=2)
    with pytest.raises(ValueError, match="opened to read"):
        nt.KernelStore(tmp_path / "store").compute()


def test_missing_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ImportError, match=r"pip install 'nt-core\[store\]'"):
        nt.KernelStore.create(tmp_path / "store", FCN[2], X1)


def test_command_line(tmp_path):
    def run(command, path=tmp_path / "store"):
        return subprocess.run([sys.executable, "-m", "nt_core.store", command, path], capture_output=True, text=True)

    assert run("status", tmp_path / "nothing").returncode == 2
    store = computed(tmp_path / "store", FCN[2], X1, get="ntk", tile=4)
    assert "ntk: 11 x 11, float32\n6 of 6 tiles" in run("status").stdout
    (store.path / "ntk" / "c" / "1" / "2").write_bytes(b"")
    damaged = run("verify")
    assert damaged.returncode == 1 and "tile (1, 2) was damaged" in damaged.stdout
    assert run("verify").returncode == 0


# ---- several processes

SCRIPT = Path(__file__).parent / "store_process.py"


def started(path, *arguments):
    return subprocess.Popen([sys.executable, SCRIPT, path, *map(str, arguments)])


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_processes_lose_nothing(tmp_path, kills):
    """Three processes at once, some of them killed at random and started again."""
    undisturbed, disturbed = tmp_path / "one", tmp_path / "three"
    assert started(undisturbed, 0, 1).wait() == 0
    clock, processes = random.Random(0), [started(disturbed, i, 3) for i in range(3)]
    for _ in range(kills):
        time.sleep(clock.uniform(1, 4))
        which = clock.randrange(3)
        processes[which].send_signal(signal.SIGKILL)
        processes[which].wait()
        processes[which] = started(disturbed, which, 3)
    for process in processes:
        assert process.wait() == 0
    one, three = (nt.KernelStore(path).ntk[:] for path in (undisturbed, disturbed))
    np.testing.assert_array_equal(one, three)
    assert np.isfinite(one).all()


def test_files_of_the_usual_size(tmp_path):
    """A tile has fewer samples where there are positions, and many small files get a warning."""
    images = RANDOM.normal(size=(9, 16, 16, 1)).astype("float32")
    store = nt.KernelStore.create(tmp_path / "images", stax.Conv(1, (1, 1))[2], images, get="nngp")
    assert store.grid.rows == 4 and store.nngp.chunk_bytes == 4**2 * 256**2 * 4
    assert nt.KernelStore.create(tmp_path / "vectors", FCN[2], np.ones((1500, 2))).grid.rows == 1024
    with pytest.warns(UserWarning, match="11,325 files of 0 KiB"):
        nt.KernelStore.create(tmp_path / "small", FCN[2], X1[:1].repeat(150, 0), tile=1)
    with pytest.raises(ValueError, match="`tile` must be positive, got 0"):
        nt.KernelStore.create(tmp_path / "none", FCN[2], X1, tile=0)


@pytest.mark.parametrize("solver", [nt.predict.Cholesky(), nt.predict.PCG(rtol=1e-9, progress=False)], ids=repr)
def test_predictions_from_a_store(tmp_path, monkeypatch, solver):
    """The Gram matrix lies on disk, and the kernels of test points in another store."""
    monkeypatch.setattr("nt_predict._tiles._TILE", 5)
    train = computed(tmp_path / "train", FCN[2], X1, tile=3)
    test = computed(tmp_path / "test", FCN[2], X2, X1, get="ntk", tile=3)
    y, in_memory = RANDOM.normal(size=(len(X1), 2)), nt.predict.Gram(FCN[2], X1, "ntk", diag_reg=0.1)
    fit = nt.predict.fit(nt.predict.Gram(train, get="ntk", diag_reg=0.1), y, solver)
    np.testing.assert_allclose(fit.mean(test.ntk), nt.predict.fit(in_memory, y).mean(X2), rtol=1e-4, atol=1e-5)
    with pytest.raises(AttributeError, match="has ntk only, not nngp"):
        nt.predict.Gram(test)


def test_executor(tmp_path):
    """The standard library's processes, with inputs that lie in a file."""
    np.save(tmp_path / "x.npy", np.concatenate([X2, X1]))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")[len(X2) :]
    store = nt.KernelStore.create(tmp_path / "store", FCN[2], x, tile=4)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        store.compute(executor=executor, progress=False)
    close(store.ntk[:], FCN[2](X1, None, "ntk"))
    assert not list(store.path.glob(".task*"))


@pytest.mark.slow
def test_dask(tmp_path):
    """A cluster of processes, one of which is killed."""
    import distributed

    store = nt.KernelStore.create(tmp_path / "store", FCN[2], X1, tile=1)
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client, client.get_executor() as executor:
        os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        store.compute(executor=executor, progress=False)
    close(store.ntk[:], FCN[2](X1, None, "ntk"))


def test_plan():
    """The sizes are those of the store, and the time grows with the pairs."""
    small, large = (plan(FCN[2], X1, n1=n, tile=1024, timed=4) for n in (2048, 60_000))
    assert small.n_tiles == 3 and large.n_tiles == 1770
    assert small.bytes == 3 * 1024**2 * 2 * 4
    assert small.seconds(1) > 0 and large.seconds(2000) == large.seconds(1) / 1770
    assert "60000 x 60000 samples, nngp and ntk, one triangle: 1,770 tiles of 1024 x 1024, 13.8 GiB" in str(large)
    assert plan(FCN[2], X1, X2, n1=100, n2=50, tile=10, get="ntk").n_tiles == 50
