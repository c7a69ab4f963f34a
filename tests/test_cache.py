"""Downloads from a server that drops connections, lies, refuses and recovers."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fileserver import FileServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rtmdet_geo import cache
from rtmdet_geo.cache import CHUNK_BYTES, MAX_ATTEMPTS, cache_dir, download
from rtmdet_geo.errors import Cancelled, ChecksumError, DownloadError, OutputError

CONTENT = bytes(range(256)) * 4000  # 1 MB, four chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    with FileServer({"/weights.pth": CONTENT}).running() as running:
        yield running


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "cache" / "weights.pth"


def fetch(server: FileServer, target: Path, **changes):
    """Download without waiting; return the pauses that would have been."""
    pauses: list[float] = []
    arguments = {"sha256": SHA256[:8], "sleep": pauses.append, **changes}
    assert download(f"{server.url}/weights.pth", target, **arguments) == target
    return pauses


def nothing_but(target: Path, *names: str) -> bool:
    return sorted(path.name for path in target.parent.iterdir()) == sorted(names)


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("RTMDET_GEO_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("RTMDET_GEO_CACHE")
    assert cache_dir().name == "rtmdet-geo" and cache_dir().is_absolute()


def test_whole_file_with_progress(server, target):
    seen: list[tuple[int, int]] = []
    assert fetch(server, target, progress=lambda done, total: seen.append((done, total))) == []
    assert target.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen) and len(seen) >= 4
    assert nothing_but(target, "weights.pth")


def test_a_file_that_is_there_is_not_fetched_again(server, target):
    fetch(server, target)
    fetch(server, target)
    fetch(server, target, sha256="")
    assert len(server.ranges) == 1


def test_a_wrong_file_at_the_place_is_replaced(server, target, caplog):
    target.parent.mkdir()
    target.write_bytes(CONTENT[:1000])
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert "not the file that it should be" in caplog.text


@pytest.mark.parametrize("sha256", [SHA256, SHA256[:8].upper(), ""])
def test_drops_are_resumed_where_they_broke(server, target, sha256):
    server.faults = ["drop:300000", "drop:1", "drop:0", "drop:400000"]
    pauses = fetch(server, target, sha256=sha256)
    assert target.read_bytes() == CONTENT
    assert server.ranges == ["", "bytes=300000-", "bytes=300001-", "bytes=300001-", "bytes=700001-"]
    assert pauses == [1.0, 1.0, 1.0, 1.0, 1.0]  # the second of two failures in a row waits 2 s, in steps of 1 s


def test_moved_files_are_followed_and_resumed(server, target):
    server.faults = ["moved", "drop:300000", "moved"]
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.ranges == ["", "", "bytes=300000-", "bytes=300000-"]


def test_a_file_that_moves_for_ever_is_given_up(server, target):
    server.always = "moved"
    with pytest.raises(DownloadError, match="HTTP 302"):
        fetch(server, target)


def test_many_drops_do_not_give_up_as_long_as_bytes_come(server, target):
    server.faults = ["drop:100000"] * 10
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_server_that_ignores_ranges(server, target):
    server.faults = ["drop:300000", "no_range"]
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_server_that_ignores_ranges_and_always_drops_is_given_up(server, target):
    server.knows_ranges, server.always = False, "drop:300000"
    with pytest.raises(DownloadError, match="300000 of 1024000 bytes"):
        fetch(server, target)
    assert len(server.ranges) == MAX_ATTEMPTS


def test_a_new_version_on_the_server_is_not_joined_to_the_old(server, target):
    """Without a hash only the ETag tells."""
    server.faults = ["drop:300000"]
    changed = CONTENT[::-1]

    def replace(_seconds: float) -> None:
        server.files["/weights.pth"], server.etag = changed, '"two"'

    download(f"{server.url}/weights.pth", target, sleep=replace)
    assert target.read_bytes() == changed


@pytest.mark.parametrize("sha256", [SHA256, ""])
def test_states_too_many_bytes(server, target, sha256):
    server.faults = ["long:5000", "long:5000"]
    fetch(server, target, sha256=sha256)
    assert target.read_bytes() == CONTENT


def test_states_too_few_bytes_once(server, target, caplog):
    server.faults = ["short:5000"]
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert "wrong hash" in caplog.text


def test_states_too_few_bytes_always(server, target):
    server.always = "short:5000"
    with pytest.raises(ChecksumError, match="1019000 bytes"):
        fetch(server, target)
    assert nothing_but(target)


def test_states_no_length(server, target):
    server.always = "no_length"
    seen: list[tuple[int, int]] = []
    fetch(server, target, progress=lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == CONTENT and {total for _, total in seen} == {0}


def test_wrong_hash_is_never_accepted(server, target):
    server.always = "wrong"
    with pytest.raises(ChecksumError, match=f"expected {SHA256[:8]}") as caught:
        fetch(server, target)
    assert str(target) in str(caught.value) and "\n" not in str(caught.value)
    assert nothing_but(target)
    assert len(server.ranges) == 2


def test_wrong_bytes_once(server, target):
    server.faults = ["wrong"]
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_another_range_than_asked_for(server, target):
    server.faults = ["drop:300000", "other_range"]
    fetch(server, target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("code", [500, 502, 503, 429, 408])
def test_server_errors_pass(server, target, code):
    server.faults = [f"status:{code}", f"status:{code}"]
    assert fetch(server, target) == [1.0, 1.0, 1.0]
    assert target.read_bytes() == CONTENT


def test_retry_after_is_obeyed_within_reason(server, target):
    server.faults = ["retry:7", "retry:86400", "retry:Wed, 21 Oct 2015 07:28:00 GMT", "retry:soon"]
    assert sum(fetch(server, target)) == 7 + cache.MAX_PAUSE_S + 4 + 8


def test_server_that_stays_ill_is_given_up(server, target):
    server.always = "status:503"
    pauses: list[float] = []
    with pytest.raises(DownloadError, match="HTTP 503"):
        download(f"{server.url}/weights.pth", target, sha256=SHA256, sleep=pauses.append)
    assert len(server.ranges) == MAX_ATTEMPTS and sum(pauses) == 1 + 2 + 4 + 8
    assert nothing_but(target)


@pytest.mark.parametrize("code", [404, 403, 410, 401])
def test_refusals_are_not_repeated(server, target, code):
    server.always = f"status:{code}"
    with pytest.raises(DownloadError, match=f"HTTP {code}"):
        fetch(server, target)
    assert len(server.ranges) == 1


def test_offline_says_which_file_to_put_where(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, target = f"http://127.0.0.1:{port}/weights.pth", tmp_path / "weights.pth"
    with pytest.raises(DownloadError) as caught:
        download(url, target, sha256=SHA256[:8], sleep=lambda seconds: None)
    message = str(caught.value)
    assert url in message and repr(str(target)) in message and SHA256[:8] in message and "\n" not in message
    assert isinstance(caught.value, OSError)
    assert list(tmp_path.iterdir()) == []
    target.write_bytes(b"half of it")
    with pytest.raises(DownloadError, match="file that is there has another hash"):
        download(url, target, sha256=SHA256[:8], sleep=lambda seconds: None)
    target.write_bytes(CONTENT)  # the advice is followed
    assert download(url, target, sha256=SHA256[:8]) == target


def test_silence_is_a_lost_connection(server, target):
    server.faults = ["stall"]
    fetch(server, target, timeout_s=0.2)
    assert target.read_bytes() == CONTENT


def test_cancel_keeps_what_came_and_the_next_run_goes_on(server, target):
    count = 0

    def enough() -> bool:
        nonlocal count
        count += 1
        return count > 4

    with pytest.raises(Cancelled, match="run again"):
        fetch(server, target, cancelled=enough)
    assert nothing_but(target, "weights.pth.part")
    kept = (target.parent / "weights.pth.part").stat().st_size
    assert 0 < kept < len(CONTENT)
    fetch(server, target)
    assert server.ranges[-1] == f"bytes={kept}-"
    assert target.read_bytes() == CONTENT and nothing_but(target, "weights.pth")


def test_cancel_while_waiting(server, target):
    server.always = "status:503"
    waited: list[float] = []
    with pytest.raises(Cancelled):
        fetch(server, target, sleep=waited.append, cancelled=lambda: len(waited) >= 2)
    assert len(waited) == 2


def test_leftovers_that_do_not_belong_are_thrown_away(server, target):
    target.parent.mkdir()
    part = target.with_name("weights.pth.part")
    part.write_bytes(b"something else")
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    target.unlink()
    part.write_bytes(CONTENT + b"and more")
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    target.unlink()
    part.write_bytes(b"something else")
    fetch(server, target, sha256="")  # nothing to check the joint by: begins anew
    assert target.read_bytes() == CONTENT


def test_whole_leftover_needs_no_network(target):
    """Killed between the last byte and the new name."""
    target.parent.mkdir()
    target.with_name("weights.pth.part").write_bytes(CONTENT)
    download("http://127.0.0.1:9/weights.pth", target, sha256=SHA256)
    assert target.read_bytes() == CONTENT and nothing_but(target, "weights.pth")


def test_empty_file(server, target):
    server.files["/weights.pth"] = b""
    fetch(server, target, sha256="")
    assert target.read_bytes() == b""
    target.unlink()
    fetch(server, target, sha256=hashlib.sha256(b"").hexdigest())
    assert target.read_bytes() == b""


def test_unwritable_places(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="RTMDET_GEO_CACHE"):
        fetch(server, tmp_path / "file" / "weights.pth")

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(OutputError, match="free some space"):
        fetch(server, tmp_path / "weights.pth")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "weights.pth"])
def test_other_schemes_are_refused(url, target):
    with pytest.raises(ValueError, match="http"):
        download(url, target)
    with pytest.raises(ValueError, match="hexadecimal"):
        download("http://x/y", target, sha256="xyz")


def test_three_threads_fetch_once(server, target):
    server.pause_s = 0.02
    threads = [threading.Thread(target=fetch, args=(server, target), kwargs={"sleep": time.sleep}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT and len(server.ranges) == 1 and nothing_but(target, "weights.pth")


def test_two_processes_fetch_once_and_a_killed_one_frees_its_lock(server, target):
    server.pause_s = 0.1
    code = "import sys\nfrom rtmdet_geo.cache import download\ndownload(sys.argv[1], sys.argv[2], sha256=sys.argv[3])"
    command = [sys.executable, "-c", code, f"{server.url}/weights.pth", str(target), SHA256[:8]]
    first = subprocess.Popen(command)
    part = target.with_name("weights.pth.part")
    while not (part.exists() and part.stat().st_size):
        assert first.poll() is None
    others = [subprocess.Popen(command) for _ in range(2)]
    first.kill()
    first.wait()
    server.pause_s = 0.0
    assert [other.wait(timeout=60) for other in others] == [0, 0]
    assert target.read_bytes() == CONTENT and nothing_but(target, "weights.pth")
    assert len(server.ranges) == 2 and server.ranges[1].startswith("bytes=")


def test_no_locks_on_this_disk(server, target, monkeypatch):
    def unsupported(file):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(cache, "try_lock", unsupported)
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_importing_it_is_light():
    code = "import sys, rtmdet_geo.cache\nprint(sorted({'torch', 'numpy', 'ssl', 'urllib.request'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


FAULTS = st.sampled_from(
    [
        "drop:0",
        "drop:1000",
        "drop:700000",
        "status:500",
        "long:10",
        "short:10",
        "no_range",
        "no_length",
        "other_range",
        "ok",
    ]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(FAULTS, max_size=8))
def test_any_mixture_ends_whole_or_not_there(server, tmp_path_factory, faults, caplog):
    """Whatever goes wrong, the final name holds the right bytes or nothing."""
    caplog.set_level(logging.CRITICAL)
    target = tmp_path_factory.mktemp("mixture") / "weights.pth"
    server.faults = list(faults)
    try:
        fetch(server, target)
    except (DownloadError, ChecksumError):
        assert not target.exists()
    else:
        assert target.read_bytes() == CONTENT
    assert not os.path.exists(f"{target}.lock")


def test_chunks_are_small_enough_to_cancel_soon():
    assert CHUNK_BYTES <= 1 << 20
