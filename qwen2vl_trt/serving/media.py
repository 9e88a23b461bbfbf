"""What a URL of a client stands for: ``data:``, http and https, ``file://`` to the bytes of an image or a video.

A URL is an instruction to this machine, which sees more than the client does. So an address must be allowed by name
and be public, and the very address that was checked is dialled; a file must lie below one folder.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import stat
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import anyio
import anyio.to_thread
import httpcore
import pybase64

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.messages import FRAME_LISTS, MediaKind, file_path

from .errors import APIError, overloaded
from .limits import Limits
from .tasks import cancelled

Address = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
Hold = Callable[[int], None]
"""Called with the number of the bytes that are read, as they come; those of ``data:`` are their body's already."""

_PORTS = {"http": 80, "https": 443}
_LONGEST_URL = 8192
_BLANKS = b" \t\n\f\r"
_UNQUOTED_PART = 1 << 16
_VISIBLE = re.compile(r"[!-~]+")
# The last label begins with a letter: 127.1, 2130706433, 0177.0.0.1 and 0x7f000001 are numbers to some resolvers.
_HOST = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NAT64 = IPv6Network("64:ff9b::/96")
_NEVER = (
    IPv6Network("64:ff9b:1::/48"),  # NAT64 of a local network
    IPv6Network("::/96"),  # IPv4-compatible, deprecated
    IPv6Network("2001::/32"),  # Teredo
    IPv6Network("fec0::/10"),  # site-local
)
_AZURE_HOST = IPv4Address("168.63.129.16")  # public by number, the machine's own host in Azure


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet's hosts; of one that embeds an IPv4 address, whether that is."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.sixtofour is not None:
            return is_public(address.sixtofour)
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if any(address in network for network in _NEVER):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved and address != _AZURE_HOST


@dataclass(frozen=True)
class _Target:
    """An http URL, taken apart once: ``path`` is with its query, ``host`` in lower case and without brackets."""

    scheme: str
    host: str
    port: int
    path: str


class MediaSource:
    """Fetches the images and videos of requests.

    Args:
        limits: bytes, seconds, and fetches at one time.
        allowed_media_domains: hosts from which http and https are taken, ``host`` or, for another port than 80 and
            443, ``host:port``; ``*`` is every host. Subdomains are hosts of their own.
        allowed_local_media_path: the folder below which ``file://`` is read.
        resolve: addresses of a host, by default the system's.
        is_allowed: whether an address may be dialled.
        ssl_context: by default with certifi's authorities.

    Raises:
        MediaError: a domain that is no host, or no such folder.
    """

    def __init__(
        self,
        limits: Limits,
        allowed_media_domains: Iterable[str] = (),
        allowed_local_media_path: str | Path | None = None,
        *,
        resolve: Resolver | None = None,
        is_allowed: Callable[[Address], bool] = is_public,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._limits, self._is_allowed, self._ssl_context = limits, is_allowed, ssl_context
        self._domains = frozenset(map(_domain, allowed_media_domains))
        self._root: Path | None = None
        if allowed_local_media_path is not None:
            self._root = Path(allowed_local_media_path).resolve()
            if not self._root.is_dir():
                raise MediaError(f"--allowed-local-media-path {allowed_local_media_path} is no folder")
        # Not asyncio's own threads: a name server that hangs would hold all of them.
        self._resolvers = ThreadPoolExecutor(limits.fetches, thread_name_prefix="resolve")
        self._resolve = resolve or self._getaddrinfo
        self._places = asyncio.Semaphore(limits.fetches)

    async def fetch_all(self, media: Sequence[tuple[MediaKind, Any, str]], hold: Hold) -> list[bytes | list[bytes]]:
        """Several at once: of each its kind, its URL or a list of the URLs of its frames, and where it is.

        Raises:
            APIError: of the first that fails; the others are let go.
        """
        tasks = [asyncio.ensure_future(self._fetch_one(*each, hold)) for each in media]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            await cancelled(*tasks)

    async def fetch(self, url: str, kind: MediaKind, where: str, hold: Hold) -> bytes | list[bytes]:
        """The bytes of an image or a video; a list of those of its frames of ``data:video/jpeg;base64,A,B,...``.

        Args:
            url: ``data:``, and what the constructor allows.
            kind: chooses the limits.
            where: in the request, for messages: ``message 1, part 2``.
            hold: see :data:`Hold`.

        Raises:
            APIError: 400, not allowed or not decodable; 413, too large; 422, an allowed address that fails or is slow;
                503, too many are fetched, or what ``hold`` raises.
        """
        most = self._limits.image_bytes if kind == "image" else self._limits.video_bytes
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return await anyio.to_thread.run_sync(self._decode, url, kind, most, where)
        if scheme == "file":
            contents = await anyio.to_thread.run_sync(self._read, url, most, where)
            hold(len(contents))
            return contents
        if scheme not in _PORTS:
            raise APIError(400, f"{where}: a URL begins with data:, https:, http: or file:")
        target = self._target(url, where)
        seconds = self._limits.image_fetch_seconds if kind == "image" else self._limits.video_fetch_seconds
        try:
            with anyio.fail_after(seconds):
                await self._places.acquire()
        except TimeoutError:
            raise overloaded(f"{where}: too many URLs are being fetched; try again later") from None
        try:
            with anyio.fail_after(seconds):
                return await self._get(target, most, where, hold)
        except TimeoutError:
            raise APIError(422, f"{where}: the URL took over {seconds:g} s") from None
        finally:
            self._places.release()

    async def _fetch_one(self, kind: MediaKind, source: Any, where: str, hold: Hold) -> bytes | list[bytes]:
        if isinstance(source, str):
            return await self.fetch(source, kind, where, hold)
        if kind == "image" or not isinstance(source, list) or not all(isinstance(url, str) for url in source):
            raise APIError(400, f"{where}: its {kind} is no URL")
        self._check_frames(len(source), where)
        seconds = self._limits.video_fetch_seconds
        frames: list[bytes] = []
        size = 0
        try:
            with anyio.fail_after(seconds):
                for number, url in enumerate(source, start=1):
                    frame = await self.fetch(url, "image", f"{where}, frame {number}", hold)
                    assert isinstance(frame, bytes)  # of an image
                    size += len(frame)
                    if size > self._limits.video_bytes:
                        raise _too_large(where, self._limits.video_bytes)
                    frames.append(frame)
        except TimeoutError:
            raise APIError(422, f"{where}: the URLs of its frames took over {seconds:g} s") from None
        return frames

    def _check_frames(self, count: int, where: str) -> None:
        most = self._limits.video_frames
        if not 0 < count <= most:
            raise APIError(400, f"{where}: {count:,} frames; this server takes 1 to {most:,}")

    # data:

    def _decode(self, url: str, kind: MediaKind, most: int, where: str) -> bytes | list[bytes]:
        header, comma, payload = url[len("data:") :].partition(",")
        media_type, *parameters = (field.strip().lower() for field in header[:_LONGEST_URL].split(";"))
        if not comma or len(header) > _LONGEST_URL:
            raise APIError(400, f"{where}: the data: URL has no comma, after which its data begins")
        if "base64" not in parameters:
            if len(payload) > 3 * most:  # three characters a byte at most
                raise _too_large(where, most)
            try:
                return _whole(_unquoted(payload), most, where)
            except UnicodeEncodeError:
                raise APIError(400, f"{where}: the data: URL is not valid text") from None
        if kind == "video" and media_type in FRAME_LISTS:
            self._check_frames(payload.count(",") + 1, where)
            frames = payload.split(",")
            if sum(map(_least_bytes, frames)) > most:
                raise _too_large(where, most)
            return [_from_base64(frame, most, f"{where}, frame {n}") for n, frame in enumerate(frames, start=1)]
        return _from_base64(payload, most, where)

    # file:

    def _read(self, url: str, most: int, where: str) -> bytes:
        refused = APIError(400, f"{where}: file:// is not allowed there (--allowed-local-media-path)")
        if self._root is None or len(url) > _LONGEST_URL or not url.lower().startswith("file:///"):
            raise refused
        try:
            parts = Path(os.path.realpath(file_path(url))).relative_to(self._root).parts
        except (ValueError, OSError):  # outside, a null byte, or a circle of links
            raise refused from None
        try:
            return self._read_below(parts, most, where)
        except OSError:
            raise APIError(422, f"{where}: the file cannot be read") from None

    def _read_below(self, parts: Sequence[str], most: int, where: str) -> bytes:
        """Open one folder after the other without following links, which may have come since they were resolved."""
        assert self._root is not None
        base = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._root, base | os.O_DIRECTORY)
        try:
            for number, part in enumerate(parts, start=1):
                # O_NONBLOCK: opening a pipe would wait for its writer.
                flags = base | (os.O_NONBLOCK | os.O_NOCTTY if number == len(parts) else os.O_DIRECTORY)
                inner = os.open(part, flags, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise APIError(422, f"{where}: the file is no regular one")
            with os.fdopen(os.dup(descriptor), "rb") as file:
                return _whole(file.read(most + 1), most, where)
        finally:
            os.close(descriptor)

    # http: and https:

    def _target(self, url: str, where: str) -> _Target:
        """Take a URL apart, refusing every form that two parsers could read differently; raises APIError 400."""
        wrong = APIError(400, f"{where}: the URL is malformed; its host is a plain name, in ASCII")
        if len(url) > _LONGEST_URL:
            raise APIError(400, f"{where}: the URL has over {_LONGEST_URL:,} characters")
        if not _VISIBLE.fullmatch(url) or "\\" in url:
            raise wrong
        try:
            split = urlsplit(url)
            host, port = _host(split.netloc), split.port
        except ValueError:
            raise wrong from None
        scheme = split.scheme
        port = _PORTS[scheme] if port is None else port
        usual = port in _PORTS.values()
        if (host, port) not in self._domains and not (usual and self._domains & {(host, None), ("*", None)}):
            raise APIError(400, f"{where}: the URL's host or port is not allowed (--allowed-media-domains)")
        path = (split.path or "/") + (f"?{split.query}" if split.query else "")
        return _Target(scheme, host, port, path)

    async def _getaddrinfo(self, host: str, port: int) -> list[str]:
        import socket

        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._resolvers, look_up)
        return [str(address[0]) for *_, address in found]

    async def _address(self, target: _Target, where: str) -> str:
        """The address to dial, of a host whose every address may be: a host has no say in which one is taken."""
        try:
            found = [target.host] if _is_address(target.host) else await self._resolve(target.host, target.port)
            addresses = [ip_address(each) for each in found]
        except (OSError, ValueError):  # UnicodeError too
            addresses = []
        if not addresses:
            raise APIError(422, f"{where}: the URL's host is not known")
        if not all(map(self._is_allowed, addresses)):
            raise APIError(400, f"{where}: the URL's host is not on the public internet")
        return str(addresses[0])

    async def _get(self, target: _Target, most: int, where: str, hold: Hold) -> bytes:
        address = await self._address(target, where)
        usual = target.port == _PORTS[target.scheme]
        name = f"[{target.host}]" if ":" in target.host else target.host
        url = httpcore.URL(
            scheme=target.scheme.encode(),
            host=address.encode(),
            port=target.port,
            target=target.path.encode(),
        )
        headers: dict[bytes | str, bytes | str] = {
            "Host": name if usual else f"{name}:{target.port}",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "User-Agent": "qwen2vl-trt",
            "Connection": "close",
        }
        certified = {"sni_hostname": target.host}  # the certificate is checked against it too
        # httpcore follows no redirect and reads no proxy of the environment.
        async with httpcore.AsyncConnectionPool(ssl_context=self._ssl_context, max_keepalive_connections=0) as pool:
            try:
                async with pool.stream("GET", url, headers=headers, extensions=certified) as response:
                    return await _body(response, most, where, hold)
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError, ValueError):
                raise APIError(422, f"{where}: the URL cannot be fetched") from None


async def _body(response: httpcore.Response, most: int, where: str, hold: Hold) -> bytes:
    headers = {name.lower(): value.strip() for name, value in response.headers}
    if 300 <= response.status < 400:
        raise APIError(422, f"{where}: the URL redirects; give the one that it leads to")
    if response.status != 200:
        raise APIError(422, f"{where}: the URL's host answers with status {response.status}")
    if headers.get(b"content-encoding", b"identity").lower() not in (b"", b"identity"):
        raise APIError(422, f"{where}: the URL's host sends compressed data, though asked not to")
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length[:20]) > most:
        raise _too_large(where, most)
    pieces, size = [], 0
    async for piece in response.aiter_stream():
        size += len(piece)
        if size > most:
            raise _too_large(where, most)
        hold(len(piece))
        pieces.append(piece)
    return _whole(b"".join(pieces), most, where)


def _domain(entry: str) -> tuple[str, int | None]:
    if entry == "*":
        return "*", None
    try:
        return _host(entry.lower()), urlsplit(f"//{entry}").port
    except ValueError:
        raise MediaError(f"--allowed-media-domains: {entry!r} is no host, host:port or *") from None


def _host(netloc: str) -> str:
    """The host of ``host[:port]``, a name or an address; raises ValueError for any other form."""
    host = urlsplit(f"//{netloc}").hostname or ""
    if re.search("[@/?#]", netloc) or not (_is_address(host) or (len(host) <= 253 and _HOST.fullmatch(host))):
        raise ValueError(netloc)
    return host


def _is_address(host: str) -> bool:
    try:
        return "%" not in str(ip_address(host))
    except ValueError:
        return False


def _least_bytes(text: str) -> int:
    """Fewest bytes that so much base64 stands for, where none of it is blank or escaped."""
    return 3 * (len(text) - text.count("=", max(0, len(text) - 2))) // 4


def _from_base64(text: str, most: int, where: str) -> bytes:
    if _least_bytes(text) > 4 * most or (_least_bytes(text) > most and not ("%" in text or " " in text)):
        raise _too_large(where, most)
    try:
        data = _unquoted(text) if "%" in text else text.encode("ascii")
        if len(data) % 4 or any(blank in data for blank in _BLANKS):  # as browsers take it
            data = data.translate(None, _BLANKS).rstrip(b"=")
            data += b"=" * (-len(data) % 4)
        return _whole(pybase64.b64decode(data, validate=True), most, where)
    except ValueError:
        raise APIError(400, f"{where}: the data: URL is not base64") from None


def _unquoted(text: str) -> bytes:
    """A text without percent-encoding, part by part: ``unquote_to_bytes`` makes an object of each ``%``."""
    parts: list[bytes] = []
    start = 0
    while start < len(text):
        end = start + _UNQUOTED_PART
        cut = text.rfind("%", end - 2, end)
        end = end if cut < 0 else cut
        parts.append(unquote_to_bytes(text[start:end]))
        start = end
    return b"".join(parts)


def _whole(data: bytes, most: int, where: str) -> bytes:
    if len(data) > most:
        raise _too_large(where, most)
    if not data:
        raise APIError(400, f"{where}: empty (0 bytes)")
    return data


def _too_large(where: str, most: int) -> APIError:
    return APIError(413, f"{where}: over {most:,} bytes; give a smaller one")
