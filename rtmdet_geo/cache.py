"""The user's cache folder, and downloads into it: resumed, retried, checked, whole or not there. Standard library only.

A file is written beside its place as ``NAME.part`` and renamed when its SHA-256 is right. What an interrupted run left
in ``NAME.part`` is resumed by the next one, if a hash is known to check the joint by. ``NAME.lock`` keeps two processes
from writing the same file; the operating system frees it when its holder dies.
"""

from __future__ import annotations

import email.utils
import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rtmdet_geo import __version__
from rtmdet_geo.errors import Cancelled, ChecksumError, DownloadError, OutputError, RTMDetGeoError

if TYPE_CHECKING:
    from http.client import HTTPResponse

logger = logging.getLogger(__name__)

#: Environment variable that names another cache folder.
CACHE_VARIABLE = "RTMDET_GEO_CACHE"
#: Bytes read at a time; ``progress`` and ``cancelled`` are called once for each.
CHUNK_BYTES = 1 << 18
#: Attempts in a row that bring no new byte before a download is given up.
MAX_ATTEMPTS = 5
#: Seconds of silence after which a connection counts as lost.
TIMEOUT_S = 30.0
#: Pause in s after the first attempt that fails; each further one doubles it.
FIRST_PAUSE_S = 1.0
#: Longest pause in s between two attempts, and the longest that a server's Retry-After is obeyed.
MAX_PAUSE_S = 30.0
#: HTTP answers that may be better the next time (RFC 9110 sections 15.5 and 15.6; 425 is RFC 8470, 429 is RFC 6585).
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Seconds between two looks at a lock that another process holds.
_LOCK_POLL_S = 0.2

Progress = Callable[[int, int], None]


def cache_dir() -> Path:
    """Return the folder of downloaded files: the variable ``RTMDET_GEO_CACHE``, else the user's cache folder.

    The folder need not exist.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("rtmdet-geo", appauthor=False)


def download(
    url: str,
    path: str | os.PathLike[str],
    *,
    sha256: str = "",
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    timeout_s: float = TIMEOUT_S,
) -> Path:
    """Fetch a file unless the right one is there already.

    A lost connection is resumed where it broke; attempts that bring nothing new are repeated after 1, 2, 4 ... s, at
    most MAX_ATTEMPTS in a row. With ``sha256`` the bytes decide what is whole, whatever length the server states.

    Args:
        url: http or https.
        path: place of the file; missing folders are made.
        sha256: the first hexadecimal digits of the file's SHA-256, as many as are known; "" checks nothing but the
            stated length, and takes a file that is there already for the right one.
        progress: called with (bytes here, bytes in all); the second is 0 as long as the server does not say.
        cancelled: asked after every chunk and while waiting; True raises Cancelled and keeps what came so far.
        sleep: called with seconds to wait.
        timeout_s: seconds of silence after which a connection counts as lost.

    Returns:
        ``path``.

    Raises:
        DownloadError: no network, no such file, or the server gave up; the message says which file to put where.
        ChecksumError: what the server sends, twice, has another hash; nothing is left.
        OutputError: the file cannot be written.
        Cancelled: see ``cancelled``.
        ValueError: ``url`` is not http or https, or ``sha256`` is not hexadecimal.
    """
    path = Path(path)
    sha256 = sha256.lower()
    if not url.lower().startswith(("http://", "https://")):
        raise ValueError(f"only http and https are downloaded, got {url!r}")
    if len(sha256) > 64 or not set(sha256) <= set("0123456789abcdef"):
        raise ValueError(f"sha256 must be up to 64 hexadecimal digits, got {sha256!r}")
    if _is_right(path, sha256):
        return path
    _make_folder(path.parent)
    wait = _Patience(sleep, cancelled)
    with _locked(path.with_name(path.name + ".lock"), wait):
        if _is_right(path, sha256):  # another process fetched it meanwhile
            return path
        if path.exists():
            logger.warning("%s is not the file that it should be; it is fetched again", path)
        transfer = _Transfer(url, path, sha256, progress, wait, timeout_s)
        transfer.run()
    return path


@dataclass
class _Patience:
    """Waits that can be cancelled."""

    sleep: Callable[[float], None]
    cancelled: Callable[[], bool] | None

    def check(self, what: str = "what came so far is kept; run again to go on") -> None:
        """Raise Cancelled if the caller wishes so."""
        if self.cancelled is not None and self.cancelled():
            raise Cancelled(what)

    def pause(self, seconds: float) -> None:
        """Sleep, in steps of at most a second so that a wish to stop is heard."""
        while seconds > 0:
            self.check()
            self.sleep(min(seconds, 1.0))
            seconds -= 1.0
        self.check()


class _Lost(Exception):  # noqa: N818 - never leaves this module
    """The attempt failed in a way that the next one may not."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass
class _Transfer:
    """One file on its way.

    Attributes:
        digest: of the bytes in the part file.
        size: bytes in the part file.
        furthest: most bytes that were ever there; only beyond it is an attempt a success.
        total: bytes in all as the server says; 0: it does not.
        validator: the server's name for this version of the file (ETag, or date), so that versions are never joined.
    """

    url: str
    path: Path
    sha256: str
    progress: Progress | None
    wait: _Patience
    timeout_s: float
    digest: Any = field(default_factory=hashlib.sha256)
    size: int = 0
    furthest: int = 0
    total: int = 0
    validator: str = ""

    @property
    def part(self) -> Path:
        """Where the bytes go before they are whole."""
        return self.path.with_name(self.path.name + ".part")

    def run(self) -> None:
        """Bring the file to its place."""
        self._take_up()
        attempts, wrong = 0, 0
        while not self._is_proven():
            before = self.furthest
            try:
                self._attempt()
            except _Lost as error:
                if self._is_proven():  # the bytes are right, whatever the server said of their number
                    break
                attempts = 1 if self.furthest > before else attempts + 1
                if attempts >= MAX_ATTEMPTS:
                    raise DownloadError(self._advice(str(error))) from error
                pause = min(max(FIRST_PAUSE_S * 2.0 ** (attempts - 1), error.retry_after_s), MAX_PAUSE_S)
                logger.warning("%s: %s; next attempt in %.0f s", self.path.name, error, pause)
                self.wait.pause(pause)
                continue
            if self._is_proven() or not self.sha256:
                break
            wrong += 1
            self._forget(is_final=wrong > 1)
        self._finish()

    def _take_up(self) -> None:
        """Resume what an earlier run left, if there is a hash to check the result by."""
        if not self.sha256:
            self._empty()
            return
        with suppress(FileNotFoundError), _writing(self.part), self.part.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                self.digest.update(chunk)
                self.size += len(chunk)
        self.furthest = self.size

    def _is_proven(self) -> bool:
        """Say whether a hash is known and the bytes here have it."""
        return bool(self.sha256) and str(self.digest.hexdigest()).startswith(self.sha256)

    def _attempt(self) -> None:
        """Ask once, from where the part file ends, and read to the end of the answer."""
        self.wait.check()
        answer = self._open()
        if answer is None:
            return
        with answer:
            expected = self._place(answer)
            with _writing(self.part):
                file = self.part.open("ab")
            with file:
                self._read(answer, file)
        if expected and self.size < expected:
            raise _Lost(f"the connection ended after {self.size} of {expected} bytes")

    def _open(self) -> HTTPResponse | None:
        """Send the request; None: the server says that all is here already.

        Raises:
            _Lost: the next attempt may succeed.
            DownloadError: it will not.
        """
        import ssl
        from http.client import HTTPException
        from urllib.error import HTTPError, URLError
        from urllib.request import Request, urlopen

        headers = {"User-Agent": f"rtmdet-geo/{__version__}", "Accept-Encoding": "identity"}
        if self.size:
            headers["Range"] = f"bytes={self.size}-"
            if self.validator:
                headers["If-Range"] = self.validator
        try:
            answer: HTTPResponse = urlopen(Request(self.url, headers=headers), timeout=self.timeout_s)
        except HTTPError as error:
            with error:
                if error.code == 416:  # nothing follows what is here
                    if not self.sha256 and error.headers.get("Content-Range") == f"bytes */{self.size}":
                        return None
                    self._empty()
                    raise _Lost("the server has no more than what came, and that is not the file") from error
                if error.code in RETRIED_STATUS:
                    raise _Lost(f"HTTP {error.code} {error.reason}", _retry_after_s(error.headers)) from error
                raise DownloadError(self._advice(f"HTTP {error.code} {error.reason}")) from error
        except URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise DownloadError(self._advice(f"certificate not trusted: {error.reason.verify_message}")) from error
            raise _Lost(str(error.reason)) from error
        except (OSError, HTTPException) as error:
            raise _Lost(f"{type(error).__name__}: {error}") from error
        return answer

    def _place(self, answer: HTTPResponse) -> int:
        """Make the part file end where the answer begins; return the number of bytes that it should have, 0 unknown."""
        length = answer.headers.get("Content-Length", "")
        expected = int(length) if length.isdecimal() else 0
        start = 0
        if answer.status == 206:
            unit, _, rest = answer.headers.get("Content-Range", "").partition(" ")
            start_text, _, _ = rest.partition("-")
            start = int(start_text) if unit == "bytes" and start_text.isdecimal() else -1
            total_text = rest.rpartition("/")[2]
            self.total = int(total_text) if total_text.isdecimal() else 0
            expected = self.total or (self.size + expected if expected else 0)
        else:
            self.total = expected
        self.validator = answer.headers.get("ETag", "") or answer.headers.get("Last-Modified", "")
        if self.validator.startswith("W/"):  # a weak validator does not promise equal bytes (RFC 9110, 8.8.1)
            self.validator = ""
        if start != self.size:
            self._empty()
            if start:
                raise _Lost("the server sent another part than was asked for")
        return expected

    def _read(self, answer: HTTPResponse, file: IO[bytes]) -> None:
        from http.client import HTTPException

        while True:
            self.wait.check()
            try:
                chunk = answer.read(CHUNK_BYTES)
            except (OSError, HTTPException) as error:
                raise _Lost(f"the connection broke ({error or type(error).__name__})") from error
            if not chunk:
                return
            with _writing(self.part):
                file.write(chunk)
            self.digest.update(chunk)
            self.size += len(chunk)
            self.furthest = max(self.furthest, self.size)
            if self.progress is not None:
                self.progress(self.size, max(self.total, self.size) if self.total else 0)

    def _empty(self) -> None:
        """Begin anew."""
        with _writing(self.part):
            self.part.unlink(missing_ok=True)
        self.digest, self.size = hashlib.sha256(), 0

    def _forget(self, *, is_final: bool) -> None:
        """Throw the bytes away; they are not the file."""
        size, found = self.size, self.digest.hexdigest()
        self._empty()
        self.furthest = 0
        if is_final:
            raise ChecksumError(
                f"{self.url} sends {size} bytes whose SHA-256 begins {found[: max(8, len(self.sha256))]}, expected "
                f"{self.sha256}; a proxy or mirror may have changed them: nothing was kept, fetch the file another way "
                f"and put it at {str(self.path)!r}"
            )
        logger.warning("%s arrived with a wrong hash; it is fetched once more", self.path.name)

    def _finish(self) -> None:
        """Give the file its name, after a look at what the disk holds."""
        with _writing(self.path):
            with self.part.open("ab") as file:
                os.fsync(file.fileno())
            if self.part.stat().st_size != self.size or not _is_right(self.part, self.sha256):
                self._empty()
                raise ChecksumError(f"{str(self.part)!r} is not what was received; check the disk and run again")
            os.replace(self.part, self.path)

    def _advice(self, reason: str) -> str:
        check = f" (its SHA-256 begins {self.sha256})" if self.sha256 else ""
        reason += "; the file that is there has another hash" if self.path.exists() else ""
        return (
            f"cannot download {self.url}: {reason}; without network, fetch that file{check} on another computer and "
            f"put it at {str(self.path)!r}, then run again"
        )


def _is_right(path: Path, sha256: str) -> bool:
    """Say whether the file is there and has the hash."""
    if not path.is_file():
        return False
    if not sha256:
        return True
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest().startswith(sha256)
    except OSError as error:
        raise OutputError(f"cannot read {str(path)!r}: {error.strerror}; check its permissions") from error


def _retry_after_s(headers: Any) -> float:
    """Return the seconds that a Retry-After header asks for: a number, or a date (RFC 9110 section 10.2.3)."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    with suppress(TypeError, ValueError):
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return 0.0


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tell the disk's failures from the network's."""
    try:
        yield
    except (FileNotFoundError, RTMDetGeoError):
        raise
    except OSError as error:
        hint = (
            "free some space" if error.errno == errno.ENOSPC else f"or name another cache folder with {CACHE_VARIABLE}"
        )
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}; {hint}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make folder {str(folder)!r}: {error.strerror}; name another with {CACHE_VARIABLE}"
        ) from error


def hold_lock(path: Path) -> AbstractContextManager[None]:
    """Hold ``path``, whose folder is made if it is missing, as a lock; wait while another process or thread does.

    Raises:
        OutputError: the folder cannot be made, or (on entering) the file not be written.
    """
    _make_folder(path.parent)
    return _locked(path, _Patience(time.sleep, None))


@contextmanager
def _locked(path: Path, wait: _Patience) -> Iterator[None]:
    """Hold ``path`` as a lock; wait while another process does. Where files cannot be locked, go on without."""
    said = False
    while True:
        with _writing(path):
            file = path.open("ab")
        try:
            is_held = try_lock(file)
        except OSError as error:
            logger.debug("no lock on %s: %s", path, error)
            is_held = True
        if is_held and _is_same_file(file, path):
            break
        file.close()
        if is_held:  # its last holder removed it: there is a new one, or none
            continue
        if not said:
            logger.warning("another process makes %s; waiting", path.stem)
            said = True
        wait.check("another process fetches the file")
        wait.pause(_LOCK_POLL_S)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps open files
            path.unlink()
        file.close()


def _is_same_file(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def try_lock(file: IO[bytes]) -> bool:
    """Lock an open file for this process alone; False: another holds it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
