"""A certificate authority for one test, by the openssl program."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest


class Certificate(NamedTuple):
    """A certificate and its private key, PEM files."""

    cert: Path
    key: Path


class Authority:
    """Makes a CA in `directory` (`ca`: its certificate) and issues certificates for 127.0.0.1, ::1 and localhost.

    addresses: others that they are for. They serve for both ends of a connection. Skips the test when openssl is not installed.
    """

    def __init__(self, directory: Path, addresses: Sequence[str] = ()) -> None:
        if not shutil.which("openssl"):
            pytest.skip("openssl is not installed: apt-get install openssl")
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.ca = directory / "ca.crt"
        self._key = directory / "ca.key"
        self._extensions = directory / "extensions"
        others = "".join(f",IP:{address}" for address in addresses)
        self._extensions.write_text(
            f"subjectAltName=IP:127.0.0.1,IP:::1,DNS:localhost{others}\nextendedKeyUsage=serverAuth,clientAuth\n"
        )
        self._openssl("req", "-x509", *_NEW_KEY, "-days", "30", "-subj", "/CN=test authority",
                      "-keyout", self._key, "-out", self.ca)  # fmt: skip

    def issue(self, name: str, subject: str | None = None) -> Certificate:
        """A certificate in NAME.crt and NAME.key. subject: `/CN=NAME` unless given; `/O=x` has no common name, which
        etcd's gateway wants of a client that logs in with a password."""
        request = self.directory / f"{name}.csr"
        made = Certificate(self.directory / f"{name}.crt", self.directory / f"{name}.key")
        self._openssl("req", *_NEW_KEY, "-subj", subject or f"/CN={name}", "-keyout", made.key, "-out", request)
        self._openssl("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._key, "-CAcreateserial",
                      "-days", "30", "-extfile", self._extensions, "-out", made.cert)  # fmt: skip
        return made

    def _openssl(self, *arguments: str | Path) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, cwd=self.directory)


_NEW_KEY = ("-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
