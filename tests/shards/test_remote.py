"""Remote shards against a local HTTP server that drops connections and truncates."""

import contextlib
import hashlib
import http.server
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.errors import raises
from support.shards import jpeg, write_shard

from maekit.checking import check_shards
from maekit.shards import download
from maekit.shards.cache import RemoteCache
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards
from maekit.system import files
from maekit.system.errors import InputError, MaekitError


class Server:
    """Serves a folder with ranges and ETags.

    Attributes:
        drop: share of answers that break off.
        truncate: share of answers that are short and say so.
        ranges: whether ranges are honoured.
        fail: how many of the next requests are answered by 503.
        tells_size: whether answers say how long they are.
        asked: (method, path, range) of each request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.drop, self.truncate, self.ranges, self.fail = folder, 0.0, 0.0, True, 0
        self.tells_size = True
        self.asked: list[tuple[str, str, str | None]] = []
        self.random = random.Random(0)
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments) -> None:
                super().__init__(*arguments, directory=str(folder))

            def log_message(self, *arguments) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def answer(self) -> None:
                path = Path(self.translate_path(self.path))
                if server.fail > 0:
                    server.fail -= 1
                    return self.send_error(503)
                if path.is_dir():
                    return super().do_GET() if self.command == "GET" else super().do_HEAD()
                wanted = self.headers.get("Range")
                server.asked.append((self.command, path.name, wanted))
                if not path.is_file():
                    return self.send_error(404)
                data = path.read_bytes()
                etag = hashlib.sha256(data).hexdigest()
                if wanted and server.ranges:
                    first, last = wanted.removeprefix("bytes=").split("-")
                    data = data[int(first) : int(last) + 1]
                    self.send_response(206)
                else:
                    self.send_response(200)
                luck = server.random.random()
                body = data
                if self.command == "GET" and luck < server.drop + server.truncate:
                    body = data[: server.random.randrange(len(data) + 1)]
                self.send_header("ETag", f'"{etag}"')
                if server.tells_size:
                    self.send_header("Content-Length", str(len(body if luck >= server.drop else data)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)
                    if len(body) < len(data):
                        self.close_connection = True

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("MAEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_LONGEST_PAUSE", 0.01)
    for shard in range(3):
        keys = {f"{shard}-{i}": {"jpg": jpeg(10 * shard + i), "bin": os.urandom(30_000)} for i in range(6)}
        write_shard(tmp_path / "public" / "sub" / f"{shard}.tar", keys)
    started = Server(tmp_path / "public")
    yield started
    started.http.shutdown()
    started.http.server_close()


def publish_indexes(server: Server) -> None:
    check_shards(find_shards(str(server.folder)), write_indexes=True, crc=True)


def test_specs(server: Server) -> None:
    for spec in ("sub", "sub/", "sub/{0..2}.tar", "sub/*.tar", "sub/[0-9].tar"):
        found = find_shards(f"{server.url}/{spec}")
        assert [shard.name for shard in found] == ["0.tar", "1.tar", "2.tar"]
        assert [shard.url for shard in found] == [f"{server.url}/sub/{i}.tar" for i in range(3)]
    assert [s.name for s in find_shards(f"{server.url}/")] == ["sub/0.tar", "sub/1.tar", "sub/2.tar"]
    assert [s.url for s in find_shards("http://[::1]:8000/a/x.tar")] == ["http://[::1]:8000/a/x.tar"]
    publish_indexes(server)
    assert [s.name for s in find_shards(f"{server.url}/sub/*")] == ["0.tar", "1.tar", "2.tar"]
    assert [s.name for s in find_shards(str(server.folder / "sub" / "*"))] == ["0.tar", "1.tar", "2.tar"]
    mixed = find_shards([str(server.folder / "sub" / "0.tar"), f"{server.url}/sub/1.tar?token=x"])
    assert len({shard.name for shard in mixed}) == 2
    for spec, said in (("nowhere/", "listed"), ("sub/*.tgz", "no file matches"), ("sub/{0.tar", "braces")):
        with raises(InputError, match=said):
            find_shards(f"{server.url}/{spec}")
    (shard,) = find_shards("nonsense://x/0.tar")
    with raises(InputError, match="knows no protocol"):
        RemoteCache().fetch(shard)


@pytest.mark.parametrize(("drop", "truncate"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.3, 0.3)])
def test_what_arrives_is_what_was_published(server: Server, monkeypatch, drop: float, truncate: float) -> None:
    monkeypatch.setattr(download, "_FIRST_PIECE", 60_000)
    monkeypatch.setattr(download, "_SMALLEST_PIECE", 4_000)
    server.drop, server.truncate = drop, truncate
    cache = RemoteCache()
    for shard in find_shards(f"{server.url}/sub/{{0..2}}.tar"):
        cache.fetch(shard)
        assert shard.path.read_bytes() == (server.folder / "sub" / shard.name).read_bytes()
    asked = len(server.asked)
    cache.fetch(shard)
    assert [method for method, _, _ in server.asked[asked:]] == ["HEAD"]


def test_a_server_without_ranges(server: Server) -> None:
    server.ranges = False
    (shard,) = find_shards(f"{server.url}/sub/0.tar")
    RemoteCache().fetch(shard)
    assert shard.path.read_bytes() == (server.folder / "sub" / "0.tar").read_bytes()


def test_a_server_that_tells_no_size(server: Server) -> None:
    server.tells_size = False
    (shard,) = find_shards(f"{server.url}/sub/0.tar")
    with raises(MaekitError, match="--cache-gb"):
        RemoteCache(limit=100_000).fetch(shard)
    assert sum(p.stat().st_size for p in files.cache_directory().rglob("*") if p.suffix in (".tar", ".part")) == 0
    RemoteCache().fetch(shard)
    assert shard.path.read_bytes() == (server.folder / "sub" / "0.tar").read_bytes()


def test_an_interrupted_download_goes_on(server: Server, monkeypatch) -> None:
    monkeypatch.setattr(download, "_FIRST_PIECE", 30_000)
    monkeypatch.setattr(download, "_LARGEST_PIECE", 30_000)
    (shard,) = find_shards(f"{server.url}/sub/0.tar")
    size = (server.folder / "sub" / "0.tar").stat().st_size
    original = download.pieces

    def two_pieces(*arguments):
        for number, piece in enumerate(original(*arguments)):
            if number == 2:
                raise KeyboardInterrupt
            yield piece

    with monkeypatch.context() as patch:
        patch.setattr(download, "pieces", two_pieces)
        with pytest.raises(KeyboardInterrupt):
            RemoteCache().fetch(shard)
    assert not shard.path.exists()
    server.asked.clear()
    RemoteCache().fetch(shard)
    ranges = [wanted for method, name, wanted in server.asked if (method, name) == ("GET", "0.tar")]
    assert ranges[0] == "bytes=60000-89999"
    assert ranges[-1].endswith(str(size - 1))
    assert shard.path.read_bytes() == (server.folder / "sub" / "0.tar").read_bytes()
    # Changed over there: what was fetched or begun before is of no use.
    write_shard(server.folder / "sub" / "0.tar", {"new": {"jpg": jpeg(5)}})
    RemoteCache().fetch(shard)
    assert shard.path.read_bytes() == (server.folder / "sub" / "0.tar").read_bytes()


def test_a_missing_shard_and_a_dead_server_are_named(server: Server) -> None:
    (shard,) = find_shards(f"{server.url}/sub/9.tar")
    with raises(MaekitError, match=r"sub/9\.tar: no such file there"):
        RemoteCache().fetch(shard)
    server.drop = 1.0
    (shard,) = find_shards(f"{server.url}/sub/0.tar")
    with raises(MaekitError, match=r"sub/0\.tar"):
        RemoteCache().fetch(shard)


def test_names_from_elsewhere_stay_inside(server: Server) -> None:
    """Names of shards become names of output files: a listing or a URL cannot lead out, and none takes another's."""
    (server.folder / "sub" / "index.html").write_text('<a href="x/../../../../../evil.tar">x</a>')
    with raises(InputError, match="lead back up"):
        find_shards(f"{server.url}/sub/")
    with raises(InputError, match="lead back up"):
        find_shards([f"{server.url}/sub/../x.tar", f"{server.url}/sub/0.tar"])
    with raises(InputError, match="would both be named"):
        find_shards(f"{server.url}/sub/0.tar?part={{0..3}}")


def test_a_server_that_is_down_for_a_while_is_asked_again(server: Server) -> None:
    (shard,) = find_shards(f"{server.url}/sub/0.tar")
    server.fail = 5
    RemoteCache().fetch(shard)
    assert shard.path.read_bytes() == (server.folder / "sub" / "0.tar").read_bytes()
    server.fail = 1000
    with raises(InputError, match="503"):
        open_shards([shard])


def test_two_processes_share_a_cache(server: Server) -> None:
    """Threads of two processes wait for each other's locks: no shard is lost over it, and each comes once."""
    for number in range(3, 16):
        write_shard(server.folder / "sub" / f"{number}.tar", {f"k{number}": {"bin": os.urandom(20_000)}})
    shards = find_shards(f"{server.url}/sub/")
    server.asked.clear()
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def work() -> None:
        with ThreadPoolExecutor(4) as pool:
            cache = RemoteCache()
            results.put(len(list(pool.map(cache.fetch, shards))))

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [16, 16]
    for process in processes:
        process.join()
    fetched = [name for method, name, _ in server.asked if method == "GET" and name.endswith(".tar")]
    assert sorted(fetched) == sorted(shard.name for shard in shards)


def test_the_room_is_kept_while_downloads_run(server: Server) -> None:
    """Four at a time into room for two: they wait for each other, and the cache is never larger than it may be."""
    shards = find_shards(f"{server.url}/sub/") * 4
    size = max((server.folder / "sub" / f"{i}.tar").stat().st_size for i in range(3))
    cache, peak, done = RemoteCache(limit=int(2.2 * size)), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            held = 0
            for path in (files.cache_directory() / "shards").rglob("*"):
                with contextlib.suppress(OSError):
                    held += path.stat().st_size if path.suffix in (".tar", ".part") else 0
            peak = max(peak, held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(cache.fetch, shards))
    done.set()
    watcher.join()
    assert 0 < peak <= cache.limit


def test_interrupted_downloads_do_not_block_each_other(server: Server, monkeypatch) -> None:
    """Parts that each fill most of the cache: whoever comes first takes the room of the others."""
    monkeypatch.setattr(download, "_FIRST_PIECE", 150_000)
    monkeypatch.setattr(download, "_ATTEMPTS", 1)
    shards = find_shards(f"{server.url}/sub/")
    for shard in shards:
        original = download.pieces

        def one_piece(*arguments, pieces=original):
            yield next(pieces(*arguments))
            raise MaekitError("broken off")

        with monkeypatch.context() as patch:
            patch.setattr(download, "pieces", one_piece)
            with raises(MaekitError, match="broken off"):
                RemoteCache().fetch(shard)
    size = max((server.folder / "sub" / f"{i}.tar").stat().st_size for i in range(3))
    with ThreadPoolExecutor(3) as pool:
        cache = RemoteCache(limit=int(1.2 * size))
        assert len(list(pool.map(cache.fetch, shards))) == 3
    assert sum(shard.path.exists() for shard in shards) == 1


def test_what_a_killed_download_left_holds_no_room(server: Server) -> None:
    (shard,) = find_shards(f"{server.url}/sub/0.tar")
    size = (server.folder / "sub" / "0.tar").stat().st_size
    shard.path.parent.mkdir(parents=True)
    shard.path.with_suffix(".room").write_text(str(size))
    shard.path.with_suffix(".part").write_bytes(b"old")
    RemoteCache(limit=int(1.5 * size)).fetch(shard)
    assert shard.path.read_bytes() == (server.folder / "sub" / "0.tar").read_bytes()
    assert not shard.path.with_suffix(".room").exists()


def test_downloads_of_unknown_size_beside_each_other(server: Server) -> None:
    server.tells_size = False
    shards = find_shards(f"{server.url}/sub/")
    size = max((server.folder / "sub" / f"{i}.tar").stat().st_size for i in range(3))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(RemoteCache(limit=4 * size).fetch, shards))
    for shard in shards:
        assert shard.path.read_bytes() == (server.folder / "sub" / shard.name).read_bytes()


def test_a_copy_that_was_damaged_here_is_fetched_anew(server: Server) -> None:
    shards = find_shards(f"{server.url}/sub/")
    check_shards(shards)
    shards[0].path.write_bytes(shards[0].path.read_bytes()[:3000])
    data = bytearray(shards[1].path.read_bytes())
    data[10] ^= 1
    shards[1].path.write_bytes(data)
    assert check_shards(shards).damaged == []


def test_stop_is_heeded_while_the_far_side_fails(server: Server) -> None:
    server.drop = 1.0
    (shard,) = find_shards(f"{server.url}/sub/0.tar")
    cache = RemoteCache()
    threading.Timer(0.2, cache.stop).start()
    before = time.monotonic()
    with pytest.raises(MaekitError):
        cache.fetch(shard)
    assert time.monotonic() - before < 3


def test_the_cache_is_bounded(server: Server, tmp_path: Path) -> None:
    shards = find_shards(f"{server.url}/sub/")
    size = (server.folder / "sub" / "0.tar").stat().st_size
    cache = RemoteCache(limit=int(2.5 * size))
    for shard in shards:
        cache.fetch(shard)
    assert [shard.path.exists() for shard in shards] == [False, True, True]
    cache.fetch(shards[1])  # used again: the other one is now the oldest
    cache.fetch(shards[0])
    assert [shard.path.exists() for shard in shards] == [True, True, False]
    with raises(MaekitError, match="--cache-gb"):
        RemoteCache(limit=1000).fetch(shards[2])


def test_many_threads_and_caches_download_once(server: Server) -> None:
    (shard,) = find_shards(f"{server.url}/sub/0.tar")
    server.asked.clear()
    threads = [threading.Thread(target=lambda: RemoteCache().fetch(shard)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([1 for method, name, _ in server.asked if (method, name) == ("GET", "0.tar")]) == 1


def test_training_needs_published_indexes_that_fit(server: Server) -> None:
    shards = find_shards(f"{server.url}/sub/")
    with raises(InputError, match="has no published index"):
        open_shards(shards)
    publish_indexes(server)
    opened = open_shards(shards)
    assert opened.digest == open_shards(find_shards(str(server.folder / "sub"))).digest
    # The shard itself is not what its index says: never read as if it were.
    path = server.folder / "sub" / "1.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with raises(MaekitError, match="not what its published index describes"):
        opened.reader().read_image(opened.index(1), 0)
    assert opened.reader().read_image(opened.index(2), 3) == jpeg(23)


def test_pretraining_on_remote_shards_sees_the_same_batches(server: Server, monkeypatch) -> None:
    """From a server that drops connections, with a cache that holds a window and the next: as from a local disk."""
    import torch

    from maekit.mae.mask_shapes import MaskShape
    from maekit.shards.order import SampleOrder
    from maekit.training.crops import Augmentation, CropLoader, WorkerProgress
    from maekit.training.data import BatchLayout, ExactSource, StepBatches, make_loader

    publish_indexes(server)
    local = open_shards(find_shards(str(server.folder / "sub")))

    def batches(shards, workers: int) -> list[torch.Tensor]:
        order = SampleOrder(shards.counts, seed=1, digest=shards.digest, window=1)
        division, watch = BatchLayout(4, 4), WorkerProgress(workers)
        source = ExactSource(order, division, first=1, last=12)
        crops = CropLoader(
            shards, order, Augmentation((32, 32), (32, 32), 1), MaskShape("random", (4, 4), 0.75), watch=watch
        )
        chunks = iter(make_loader(source, crops, division, workers=workers, prefetch=1, pin=False))
        steps = StepBatches(chunks, division, shards=shards, watch=watch, patience=60)
        return [steps.next()[0][0].images for _ in range(1, 12)]

    expected = batches(local, 0)
    server.drop = 0.3
    for workers in (0, 2):
        far = open_shards(find_shards(f"{server.url}/sub/"), remote=RemoteCache(int(2.5 * local.bytes_of(0))))
        assert all(torch.equal(a, b) for a, b in zip(batches(far, workers), expected, strict=True))


def test_check_reads_remote_shards(server: Server) -> None:
    (server.folder / "sub" / "1.tar").write_bytes((server.folder / "sub" / "0.tar").read_bytes()[:5000])
    report = check_shards(find_shards(f"{server.url}/sub/"))
    assert (report.samples, [shard.name for shard in report.damaged]) == (12, ["1.tar"])
    with raises(InputError, match="beside local shards"):
        check_shards(find_shards(f"{server.url}/sub/"), write_indexes=True)


def test_several_images_in_remote_samples(server: Server) -> None:
    """The published index says so: nothing is downloaded to refuse, and the line names the shard by its address."""
    both = {"depth.png": jpeg(1), "rgb.png": jpeg(2)}
    write_shard(server.folder / "several" / "0.tar", {"a": both, "b": both})
    publish_indexes(server)
    found = find_shards(f"{server.url}/several/")
    said = rf"^{server.url}/several/0.tar: the sample 'a' has several images .*--image depth.png"
    with raises(InputError, match=said):
        open_shards(found).refuse_ambiguous()
    shards = open_shards(found, image="rgb.png")
    shards.refuse_ambiguous()
    assert shards.unused == {"depth.png": 2}
    assert ("GET", "0.tar", None) not in server.asked
    assert list(shards.images([0, 1], lambda data: data)) == [both["rgb.png"]] * 2


def test_a_remote_folder_of_images_is_refused_with_the_way(server: Server) -> None:
    (server.folder / "pictures").mkdir()
    (server.folder / "pictures" / "a.jpg").write_bytes(jpeg(1))
    with raises(
        InputError,
        match="pictures/: no .tar file is listed there, but 1 image; download .* maekit pack it",
    ):
        find_shards(f"{server.url}/pictures/")
