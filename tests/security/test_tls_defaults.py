"""TLS as it is without any option: versions, ciphers, whom we believe, and one line for each refusal. The peers are OpenSSL's
own programs, also for what Python would not speak any more."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from support.keys import wait_until
from support.server import free_port
from wincey.http.server import HttpServer, Response
from wincey.model.errors import StoreDenied
from wincey.store.endpoints import tls_context
from wincey.store.etcd3 import Etcd3Store

WEAK = "ALL:@SECLEVEL=0"  # or the program would refuse itself


class Papers:
    """Certificates of one authority, with names and dates as a test wants them."""

    def __init__(self, directory, name="test authority"):
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = self._sign(self._name, self._key.public_key(), x509.BasicConstraints(True, None), 30)
        self.ca = self._write("ca.crt", self._certificate)

    def issue(self, name, *, host="127.0.0.1", days=30):
        """Paths of certificate and key, for one address, until so many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        path = self.directory / f"{name}.key"
        path.write_bytes(key.private_bytes(*pem))
        return str(self._write(f"{name}.crt", self._sign(subject, key.public_key(), names, days))), str(path)

    def _sign(self, subject, public, extension, days):
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(public)
        builder = builder.serial_number(x509.random_serial_number()).add_extension(extension, critical=False)
        begin, end = now - datetime.timedelta(days=60), now + datetime.timedelta(days=days)
        return builder.not_valid_before(begin).not_valid_after(end).sign(self._key, hashes.SHA256())

    def _write(self, name, certificate):
        path = self.directory / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    return Papers(tmp_path_factory.mktemp("papers"))


def s_client(port, *options):
    argv = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", *options]
    done = subprocess.run(argv, input="", capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


async def serve(papers, **options):
    async def hello(request):
        return Response(200, b"hello\n")

    certificate, key = papers.issue("server")
    server = HttpServer(hello)
    port = await server.listen_tcp("127.0.0.1", 0, tls_context(key, certificate, server=True, **options))
    return server, port


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
async def test_our_servers_turn_old_versions_away(papers, caplog, version):
    server, port = await serve(papers)
    try:
        code, said = await asyncio.to_thread(s_client, port, version, "-cipher", WEAK)
        assert code != 0
        assert "Cipher is (NONE)" in said
    finally:
        await server.close()
    told = [record.getMessage() for record in caplog.records if "TLS with" in record.getMessage()]
    assert told == ["TLS with 127.0.0.1 failed: unsupported protocol"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]  # nothing but that line


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_and_speak_those_that_are_good(papers, version):
    server, port = await serve(papers)
    try:
        code, said = await asyncio.to_thread(s_client, port, version, "-CAfile", papers.ca, "-verify_return_error")
        assert code == 0, said
        assert "Verify return code: 0 (ok)" in said
    finally:
        await server.close()


@pytest.mark.parametrize("cipher", ["NULL", "aNULL", "RC4", "3DES", "EXPORT"])
async def test_no_cipher_that_is_broken(papers, cipher):
    server, port = await serve(papers)
    try:
        code, said = await asyncio.to_thread(s_client, port, "-tls1_2", "-cipher", f"{cipher}:@SECLEVEL=0")
        assert code != 0
        assert "Cipher is (NONE)" in said or "no cipher" in said.lower()
    finally:
        await server.close()


def test_every_cipher_of_both_ends_is_authenticated_and_of_128_bits_or_more(papers):
    certificate, key = papers.issue("ciphers")
    for context in (tls_context(), tls_context(key, certificate, server=True)):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        for cipher in context.get_ciphers():
            assert cipher["strength_bits"] >= 128
            assert cipher["auth"] != "auth-null"
            assert not {"RC4", "DES", "MD5", "NULL"} & set(cipher["name"].replace("_", "-").split("-"))


def test_our_clients_verify_certificate_and_name():
    context = tls_context()
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname


@pytest.mark.parametrize(
    ("certificate", "options", "words"),
    [
        ({"host": "127.0.0.2"}, [], "IP address mismatch, certificate is not valid for '127.0.0.1'"),
        ({"days": -1}, [], "certificate has expired"),
        ({}, ["-tls1_1", "-cipher", WEAK], "tls"),
        (None, [], "unable to get local issuer certificate"),
    ],
    ids=["another name", "expired", "tls 1.1", "unknown authority"],
)
async def test_our_clients_refuse_in_one_line(papers, tmp_path, certificate, options, words):
    known = papers if certificate is not None else Papers(tmp_path, "another authority")
    name = f"peer{abs(hash(words))}"
    crt, key = papers.issue(name, **(certificate or {}))
    port = free_port()
    argv = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", crt, "-key", key, "-quiet", *options]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    store = Etcd3Store([f"https://127.0.0.1:{port}"], tls_context(cafile=str(known.ca)), deadline=10.0)
    try:
        await asyncio.to_thread(wait_until, lambda: f":{port:04X} " in Path("/proc/net/tcp").read_text())
        with pytest.raises(StoreDenied) as caught:
            await store.get("/x")
    finally:
        await store.close()
        process.kill()
        process.communicate()
    text = str(caught.value)
    assert words in text.lower() or words in text
    assert f"127.0.0.1:{port}: TLS: " in text
    assert "\n" not in text


async def test_a_server_with_an_authority_wants_a_certificate_of_it(papers, tmp_path, caplog):
    stranger = Papers(tmp_path, "another authority")
    server, port = await serve(papers, cafile=str(papers.ca))
    try:
        for crt, key in (stranger.issue("stranger"), papers.issue("late", days=-1)):
            await asyncio.to_thread(s_client, port, "-cert", crt, "-key", key)
        await asyncio.to_thread(s_client, port)
        crt, key = papers.issue("friend")
        code, _ = await asyncio.to_thread(s_client, port, "-cert", crt, "-key", key)
        assert code == 0
    finally:
        await server.close()
    told = [
        record.getMessage().partition("failed: ")[2] for record in caplog.records if "TLS with" in record.getMessage()
    ]
    assert told == [
        "unable to get local issuer certificate",
        "certificate has expired",
        "peer did not return a certificate",
    ]
