"""What a client's URL reaches: no address of this machine or its network, no file outside one folder, no more bytes."""

import asyncio
import base64
import datetime
import os
import socket
import ssl
import tracemalloc
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address
from urllib.parse import unquote_to_bytes

import pytest

pytest.importorskip("httpcore")
pytest.importorskip("pybase64")

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.serving.errors import APIError, overloaded
from qwen2vl_trt.serving.limits import Limits
from qwen2vl_trt.serving.media import MediaSource, is_public

SMALL = replace(Limits(), image_bytes=1000, video_bytes=2000, video_frames=4)
HEAD = b"HTTP/1.1 200 OK\r\n"


def response(body, *headers):
    return HEAD + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + body


def sized(body):
    return response(body, b"Content-Length: %d" % len(body))


@asynccontextmanager
async def listening(answer=b"", tls=None, host="127.0.0.1"):
    """A server that gives one answer, or does what a function does: its port, and the requests it was sent."""
    requests = []

    async def serve(reader, writer):
        requests.append(b"")
        try:
            requests[-1] = await reader.readuntil(b"\r\n\r\n")
            if callable(answer):
                await answer(writer)
            else:
                writer.write(answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1], requests
    finally:
        server.close()


def free(size):
    """Bytes that nobody counts."""


def resolving(*answers):
    """A resolver that gives one list of addresses after the other, and the names that it was asked."""
    asked, left = [], list(answers)

    async def resolve(host, port):
        asked.append(host)
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve, asked


def local(port, limits=SMALL, **options):
    """A source for which the test's server is the internet's ``example.org``."""
    options = {"resolve": resolving(["127.0.0.1"])[0], "is_allowed": lambda address: True} | options
    return MediaSource(limits, [f"example.org:{port}"], **options)


def fetched(source, url, kind="image"):
    return asyncio.run(source.fetch(url, kind, "message 1, part 2", free))


def status(source, url, kind="image"):
    with pytest.raises(APIError) as caught:
        fetched(source, url, kind)
    assert caught.value.message.startswith("message 1, part 2")
    return caught.value.status


async def answered(answer, limits=SMALL, path="/a.png", tls=None, **options):
    async with listening(answer, tls=tls) as (port, requests):
        url = f"{'https' if tls else 'http'}://example.org:{port}{path}"
        return await local(port, limits, **options).fetch(url, "image", "image 1", free), requests


def failure(answer, limits=SMALL, **options):
    with pytest.raises(APIError) as caught:
        asyncio.run(answered(answer, limits, **options))
    return caught.value


class TestAddresses:
    @pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"])
    def test_public(self, address):
        assert is_public(ip_address(address))

    @pytest.mark.parametrize(
        "address",
        [
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "127.1.2.3",
            "168.63.129.16",
            "169.254.169.254",
            "172.16.0.1",
            "192.168.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::8.8.8.8",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "fe80::1",
            "fe80::1%lo",
            "fc00::1",
            "fd00:ec2::254",
            "fec0::1",
            "ff02::1",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::1",
            "2002:7f00:1::1",
            "2002:a00:1::1",
            "2001:0:7f00:1::1",
            "2001:db8::1",
        ],
    )
    def test_not_public(self, address):
        assert not is_public(ip_address(address))


class TestListenerIsNeverReached:
    FORMS = (
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://LOCALHOST:{port}/",
        "http://localhost.:{port}/",
        "http://127.0.0.1.:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://[::ffff:7f00:1]:{port}/",
        "http://[64:ff9b::7f00:1]:{port}/",
        "http://[2002:7f00:1::]:{port}/",
        "http://[fe80::1%25lo]:{port}/",
        "http://2130706433:{port}/",
        "http://0x7f000001:{port}/",
        "http://0177.0.0.1:{port}/",
        "http://0x7f.0.0.1:{port}/",
        "http://127.1:{port}/",
        "http://0:{port}/",
        "http://0.0.0.0:{port}/",
        "http://example.org@127.0.0.1:{port}/",
        "http://example.org:80@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}\\@example.org/",
        "http:\\\\127.0.0.1:{port}/",
        "http://127.0.0.1:{port}#@example.org/",
        "http://127.0.0.1:{port}?@example.org/",
        "http://127。0。0。1:{port}/",
        "http://①②⑦.0.0.1:{port}/",
        "http://\uff4cocalhost:{port}/",
        "http://%31%32%37.0.0.1:{port}/",
        "http://127.0.0.1:{port}%2f@example.org/",
        "http:///127.0.0.1:{port}/",
        "http://:{port}/",
        "http://",
        "http:127.0.0.1:{port}",
        " http://127.0.0.1:{port}/",
        "ht\ntp://127.0.0.1:{port}/",
        "http://127.0.0.1:{port}/\r\nHost: example.org",
        "http://127.0.0.1:{port}/\x00",
        "http://127.0.0.1:+{port}/",
        "http://127.0.0.1:{port}x/",
        "http://127.0.0.1:{port}/" + "a" * 10_000,
        "ftp://127.0.0.1:{port}/",
        "gopher://127.0.0.1:{port}/_GET",
        "unix:///tmp/socket",
        "//127.0.0.1:{port}/",
        "",
    )

    @pytest.mark.parametrize("form", FORMS)
    def test_whatever_is_allowed(self, form):
        async def run():
            async with listening(sized(b"secret")) as (port, requests):
                hosts = ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "example.org"]
                everything = ["*", *(f"{host}:{port}" for host in hosts)]
                for domains in ((), ["*"], everything):
                    with pytest.raises(APIError) as caught:
                        await MediaSource(Limits(), domains).fetch(form.format(port=port), "image", "image 1", free)
                    assert caught.value.status == 400
                    assert "127" not in caught.value.message
                assert not requests

        asyncio.run(run())

    def test_a_name_with_one_private_address_among_public_ones(self):
        resolve, _ = resolving(["8.8.8.8", "127.0.0.1"])
        assert status(MediaSource(Limits(), ["*"], resolve=resolve), "http://example.org/a.png") == 400

    def test_a_name_that_is_rebound(self):
        """The first answer is checked and dialled; there is no second question, whose answer would be refused."""
        resolve, asked = resolving(["127.0.0.1"], ["127.0.0.2"])
        seen = []

        def is_allowed(address):
            seen.append(str(address))
            return str(address) == "127.0.0.1"

        body, requests = asyncio.run(answered(sized(b"pixels"), resolve=resolve, is_allowed=is_allowed))
        assert body == b"pixels"
        assert len(requests) == 1
        assert asked == ["example.org"]
        assert seen == ["127.0.0.1"]

    def test_a_redirect(self):
        async def run():
            async with listening(sized(b"secret")) as (hidden, secrets):
                moved = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:%d/\r\nContent-Length: 0\r\n\r\n" % hidden
                with pytest.raises(APIError) as caught:
                    await answered(moved)
                assert caught.value.status == 422
                assert not secrets

        asyncio.run(run())

    def test_a_proxy_of_the_environment(self, monkeypatch):
        async def run():
            async with listening(sized(b"proxied")) as (port, seen):
                for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
                    monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
                assert (await answered(sized(b"direct")))[0] == b"direct"
                assert not seen

        asyncio.run(run())


class TestDomains:
    @pytest.mark.parametrize(
        "url",
        [
            "http://example.com/",
            "http://aexample.org/",
            "http://a.example.org/",
            "http://example.org.evil.com/",
            "http://example.org:8080/",
            "http://example.org:22/",
            "http://8.8.8.8/",
        ],
    )
    def test_others_are_refused_without_a_look_up(self, url):
        resolve, asked = resolving(["8.8.8.8"])
        assert status(MediaSource(Limits(), ["example.org"], resolve=resolve), url) == 400
        assert not asked

    def test_a_name_is_compared_in_lower_case(self):
        async def run():
            async with listening(sized(b"pixels")) as (port, requests):
                assert (
                    await local(port).fetch(f"HTTP://EXAMPLE.ORG:{port}/A?b=C#d", "image", "image 1", free) == b"pixels"
                )
                assert requests[0].startswith(b"GET /A?b=C HTTP/1.1\r\nHost: example.org:%d\r\n" % port)

        asyncio.run(run())

    @pytest.mark.parametrize("entry", ["http://example.org", "*.example.org", "a b", "", "user@example.org", "a:x"])
    def test_what_is_no_host(self, entry):
        with pytest.raises(MediaError, match="--allowed-media-domains"):
            MediaSource(Limits(), [entry])


class TestHosts:
    @pytest.mark.parametrize(
        "answer",
        [
            sized(bytes(1001)),
            response(bytes(1001)),
            response(b"3e9\r\n" + bytes(1001) + b"\r\n0\r\n\r\n", b"Transfer-Encoding: chunked"),
            response(b"", b"Content-Length: 999999999999999"),
        ],
        ids=["length", "no length", "chunked", "a lie"],
    )
    def test_too_large(self, answer):
        assert failure(answer).status == 413

    def test_an_endless_body_is_left_when_it_is_too_large(self):
        async def endless(writer):
            writer.write(HEAD + b"\r\n")
            while True:
                writer.write(bytes(65536))
                await writer.drain()

        assert failure(endless).status == 413

    @pytest.mark.parametrize("answer", [sized(bytes(1000)), response(bytes(1000))], ids=["length", "no length"])
    def test_as_large_as_may_be(self, answer):
        assert asyncio.run(answered(answer))[0] == bytes(1000)

    @pytest.mark.parametrize("first", [b"", HEAD, HEAD + b"Content-Length: 900\r\n\r\n"], ids=["none", "head", "body"])
    def test_one_that_trickles(self, first):
        """A byte now and then keeps no fetch alive: the seconds are those of the whole."""

        async def trickle(writer):
            writer.write(first)
            while True:
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.02)

        error = failure(trickle, replace(SMALL, image_fetch_seconds=0.3))
        assert (error.status, error.message) == (422, "image 1: the URL took over 0.3 s")

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\n\r\na",
            b"nonsense\r\n\r\n",
            b"",
            response(b"ab", b"Content-Length: 9"),
            response(b"a", b"Content-Encoding: gzip", b"Content-Length: 1"),
            HEAD + b"A: " + b"a" * 500_000 + b"\r\n\r\n",
        ],
    )
    def test_one_that_fails(self, answer):
        error = failure(answer)
        assert error.status == 422
        assert "127.0.0.1" not in error.message
        assert "example" not in error.message

    def test_nobody_listens(self):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))  # taken, and nobody listens
            port = unused.getsockname()[1]
            assert status(local(port), f"http://example.org:{port}/") == 422

    def test_an_unknown_name(self):
        async def unknown(host, port):
            raise socket.gaierror("no such host")

        assert status(MediaSource(Limits(), ["*"], resolve=unknown), "http://example.org/") == 422

    def test_only_so_many_at_once(self):
        async def run():
            limits = replace(SMALL, fetches=1, image_fetch_seconds=0.3)
            gate = asyncio.Event()

            async def held(writer):
                await gate.wait()

            async with listening(held) as (port, requests):
                source, url = local(port, limits), f"http://example.org:{port}/"
                both = await asyncio.gather(
                    *(source.fetch(url, "image", "image 1", free) for _ in range(2)), return_exceptions=True
                )
                gate.set()
            assert both[0].status == 422
            assert both[1].status in (422, 503)
            assert len(requests) <= 2

        asyncio.run(run())

    def test_the_frames_of_a_video_have_its_time(self):
        async def run():
            async def slow(writer):
                await asyncio.sleep(0.2)
                writer.write(sized(b"a"))

            limits = replace(SMALL, image_fetch_seconds=60, video_fetch_seconds=0.3)
            async with listening(slow) as (port, _):
                url = f"http://example.org:{port}/"
                with pytest.raises(APIError, match="frames took over") as caught:
                    await local(port, limits).fetch_all([("video", [url] * 4, "video 1")], free)
                assert caught.value.status == 422

        asyncio.run(run())

    def test_of_several_the_first_failure_ends_all(self):
        async def run():
            async with listening(sized(b"pixels")) as (port, _):
                source, url = local(port), f"http://example.org:{port}/"
                media = [("image", url, "image 1"), ("video", [url, url], "video 1")]
                assert await source.fetch_all(media, free) == [b"pixels", [b"pixels", b"pixels"]]
                for wrong in (("image", 3, "image 2"), ("video", [url] * 5, "video 2"), ("video", [], "video 3")):
                    with pytest.raises(APIError) as caught:
                        await source.fetch_all([*media, wrong], free)
                    assert caught.value.status == 400

        asyncio.run(run())


class TestBytesInFlight:
    """What is fetched counts while it comes, beside what other requests hold."""

    def test_every_byte_counts_while_it_comes(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"x" * 600)

        async def run():
            held = []
            async with listening(sized(b"y" * 900)) as (port, _):
                source, url = local(port, allowed_local_media_path=tmp_path), f"http://example.org:{port}/"
                local_file = f"file://{tmp_path}/a.png"
                media = [("image", url, "1"), ("video", [url, "data:,pixels"], "2"), ("image", local_file, "3")]
                await source.fetch_all(media, held.append)
            assert sum(held) == 900 + 900 + 600

        asyncio.run(run())

    def test_it_ends_where_there_is_no_room(self):
        """Before the host has sent everything: here it never does."""
        gone = asyncio.Event()

        async def endless(writer):
            writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"64\r\n" + b"x" * 100 + b"\r\n")
            await writer.drain()
            await gone.wait()

        def hold(size):
            raise overloaded("full")

        async def run():
            async with listening(endless) as (port, _):
                with pytest.raises(APIError, match="full") as caught:
                    await local(port).fetch(f"http://example.org:{port}/", "image", "image 1", hold)
                gone.set()
            assert caught.value.status == 503

        asyncio.run(run())


class TestCertificates:
    @pytest.fixture
    def contexts(self, tmp_path):
        """Of a server that is example.org, and of a client that trusts it."""
        x509 = pytest.importorskip("cryptography.x509")
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "example.org")])
        now = datetime.datetime.now(datetime.timezone.utc)
        day = datetime.timedelta(days=1)
        builder = x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now - day, now + day
        )
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("example.org")]), critical=False)
        certificate = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file = tmp_path / "both.pem"
        file.write_bytes(certificate + private)
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(file)
        return server, ssl.create_default_context(cafile=str(file))

    def test_is_checked_by_name_though_an_address_is_dialled(self, contexts):
        server, client = contexts
        assert asyncio.run(answered(sized(b"pixels"), tls=server, ssl_context=client))[0] == b"pixels"

    def test_of_another_name_is_refused(self, contexts):
        server, client = contexts

        async def run():
            async with listening(sized(b"pixels"), tls=server) as (port, requests):
                resolve, _ = resolving(["127.0.0.1"])
                source = MediaSource(SMALL, [f"other.org:{port}"], resolve=resolve, is_allowed=bool, ssl_context=client)
                with pytest.raises(APIError) as caught:
                    await source.fetch(f"https://other.org:{port}/", "image", "image 1", free)
                assert caught.value.status == 422
                assert not any(requests)

        asyncio.run(run())

    def test_of_nobody_known_is_refused(self, contexts):
        assert failure(sized(b"pixels"), tls=contexts[0]).status == 422


class TestData:
    @pytest.mark.parametrize(
        "url",
        [
            "data:image/png;base64," + base64.b64encode(b"pixels!").decode(),
            "DATA:;base64,cGl4ZWxzIQ",
            "data:image/png;base64,cGl4\nZWxz IQ%3D%3D",
            "data:,pixels%21",
        ],
    )
    def test_forms(self, url):
        assert fetched(MediaSource(SMALL), url) == b"pixels!"

    def test_frames(self):
        source, url = MediaSource(SMALL), "data:video/jpeg;base64,YQ==,Yg=="
        assert fetched(source, url, "video") == [b"a", b"b"]
        assert status(source, url) == 400  # an image is one

    @pytest.mark.parametrize(
        "url",
        [
            "data:",
            "data:image/png;base64",
            "data:image/png;base64,",
            "data:;base64,a*b=",
            "data:;base64,é",
            "data:,é",
            "data:;base64,%ff",
        ],
    )
    def test_what_cannot_be_decoded(self, url):
        if url == "data:,é":
            assert fetched(MediaSource(SMALL), url) == "é".encode()
        else:
            assert status(MediaSource(SMALL), url) == 400

    @pytest.mark.parametrize("count", [1001, 100_000])
    def test_too_large_is_not_decoded(self, count, monkeypatch):
        assert len(fetched(MediaSource(SMALL), "data:;base64," + base64.b64encode(bytes(1000)).decode())) == 1000
        monkeypatch.setattr("pybase64.b64decode", None)
        assert status(MediaSource(SMALL), "data:;base64," + base64.b64encode(bytes(count)).decode()) == 413

    @pytest.mark.parametrize(
        "url",
        ["data:;base64,%s" % ("%41" * 400_000), "data:,%s" % ("%41" * 400_000), "data:;base64,%s" % ("aaa " * 400_000)],
    )
    def test_what_is_escaped_takes_no_more_memory(self, url):
        source = MediaSource(replace(SMALL, image_bytes=1 << 20))
        tracemalloc.start()
        assert len(fetched(source, url)) >= 300_000
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert taken < 6 * len(url)

    @pytest.mark.parametrize("part", [3, 4, 5, 7, 1 << 16])
    def test_escapes_in_parts(self, part, monkeypatch):
        monkeypatch.setattr("qwen2vl_trt.serving.media._UNQUOTED_PART", part)
        for text in ("%41%42%43", "a%41é%4", "%%41%%%", "abcdefg%", "%f", "%e5%8c%97" * 5):
            assert fetched(MediaSource(SMALL), f"data:,{text}") == unquote_to_bytes(text)

    def test_too_many_frames(self):
        source = MediaSource(SMALL)
        assert status(source, "data:video/jpeg;base64," + "YQ==," * 4 + "YQ==", "video") == 400
        frame = base64.b64encode(bytes(700)).decode()
        assert status(source, "data:video/jpeg;base64," + ",".join([frame] * 3), "video") == 413


class TestFiles:
    @pytest.fixture
    def source(self, tmp_path):
        below = tmp_path / "below"
        (below / "deep").mkdir(parents=True)
        (below / "deep" / "a b.png").write_bytes(b"pixels")
        (below / "inner").symlink_to(below / "deep")
        (below / "large").write_bytes(bytes(1001))
        (tmp_path / "secret").write_bytes(b"secret")
        (tmp_path / "below2").mkdir()
        (tmp_path / "below2" / "secret").write_bytes(b"secret")
        (below / "out").symlink_to(tmp_path / "secret")
        (below / "up").symlink_to(tmp_path)
        (below / "circle").symlink_to(below / "circle")
        os.mkfifo(below / "pipe")
        return MediaSource(SMALL, allowed_local_media_path=below)

    @pytest.mark.parametrize("name", ["deep/a%20b.png", "inner/a%20b.png", "deep/../deep/a%20b.png"])
    def test_below_the_folder(self, name, source, tmp_path):
        assert fetched(source, f"file://{tmp_path}/below/{name}") == b"pixels"

    @pytest.mark.parametrize(
        "name", ["../secret", "%2e%2e/secret", "out", "up/secret", "up/none", "../below2/secret", "../none", "a%00b"]
    )
    def test_outside(self, name, source, tmp_path):
        assert status(source, f"file://{tmp_path}/below/{name}") == 400

    @pytest.mark.parametrize(
        "url", ["file:///etc/passwd", "file://host/etc/passwd", "file:below/large", "file://", "FILE:///etc/passwd"]
    )
    def test_other_forms(self, url, source):
        assert status(source, url) == 400

    @pytest.mark.parametrize(
        ("name", "expected"), [("none", 422), ("deep", 422), ("", 422), ("pipe", 422), ("circle", 422), ("large", 413)]
    )
    def test_what_cannot_be_read(self, name, expected, source, tmp_path):
        assert status(source, f"file://{tmp_path}/below/{name}") == expected

    def test_a_link_that_comes_after_the_check(self, source, tmp_path, monkeypatch):
        """As if a folder were replaced between the two."""
        monkeypatch.setattr("os.path.realpath", lambda path: str(path))
        assert status(source, f"file://{tmp_path}/below/out") == 422
        assert status(source, f"file://{tmp_path}/below/up/secret") == 422

    def test_none_without_a_folder(self, tmp_path):
        (tmp_path / "a").write_bytes(b"pixels")
        assert status(MediaSource(SMALL), f"file://{tmp_path}/a") == 400
        with pytest.raises(MediaError, match="--allowed-local-media-path"):
            MediaSource(SMALL, allowed_local_media_path=tmp_path / "none")
