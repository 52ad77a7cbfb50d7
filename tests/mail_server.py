"""A mail server on loopback with STARTTLS or TLS from the first byte, signed by a CA of its own.

Owns: the certificates, the sockets, who logged in and what came. Never: judges what came.
"""

from __future__ import annotations

import base64
import datetime as dt
import email
import email.policy
import ipaddress
import socketserver
import ssl
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from receivers import Served


def certificates(folder: Path) -> Path:
    """Writes ca.pem and server.pem (key and certificate, for localhost); the CA's path."""
    now = dt.datetime.now(dt.timezone.utc)

    def build(name: str, issuer: x509.Name | None, key, signer, is_ca: bool) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(issuer or subject)
            .public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )  # fmt: skip
        if not is_ca:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
            builder = builder.add_extension(usage, critical=False)
        return builder.sign(signer, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = build("test ca", None, ca_key, ca_key, True)
    server = build("localhost", ca.subject, key, ca_key, False)
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    (folder / "server.pem").write_bytes(secret + server.public_bytes(pem))
    return folder / "ca.pem"


@dataclass
class MailServer(Served):
    """Takes mail; `refusal` is what it says to DATA instead."""

    pem: Path | None = None
    starttls: bool = True
    refusal: str = ""
    mails: list[Message] = field(default_factory=list)
    logins: list[str] = field(default_factory=list)
    # Whether each mail came over TLS.
    secure: list[bool] = field(default_factory=list)

    def __enter__(self) -> "MailServer":
        outer = self
        tls = None
        if self.pem:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(self.pem)

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                try:
                    self.talk()
                except (OSError, ssl.SSLError):
                    pass  # a client that went away, or does not trust us

            def wrap(self):
                self.request = tls.wrap_socket(self.request, server_side=True)
                self.file, self.is_secure = self.request.makefile("rb"), True

            def say(self, text: str):
                self.request.sendall(f"{text}\r\n".encode())

            def talk(self):
                self.file, self.is_secure = self.request.makefile("rb"), False
                if tls and not outer.starttls:
                    self.wrap()
                self.say("220 test ESMTP")
                while line := self.file.readline().decode().strip():
                    word = line.split(" ")[0].upper()
                    if word == "EHLO":
                        offers = ["STARTTLS"] if tls and not self.is_secure else ["AUTH PLAIN"]
                        self.say(f"250-test\r\n250 {offers[0]}")
                    elif word == "STARTTLS":
                        self.say("220 go on")
                        self.wrap()
                    elif word == "AUTH":
                        _, user, password = base64.b64decode(line.split(" ")[2]).split(b"\0")
                        outer.logins.append(f"{user.decode()}:{password.decode()}")
                        self.say("235 welcome")
                    elif word == "DATA" and outer.refusal:
                        self.say(outer.refusal)
                    elif word == "DATA":
                        self.say("354 go on")
                        lines = []
                        while (text := self.file.readline()) != b".\r\n":
                            lines.append(text.removeprefix(b"."))
                        policy = email.policy.default
                        outer.mails.append(email.message_from_bytes(b"".join(lines), policy=policy))
                        outer.secure.append(self.is_secure)
                        self.say("250 taken")
                    elif word == "QUIT":
                        self.say("221 bye")
                        return
                    else:
                        self.say("250 ok")

        return self.serve(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler))
