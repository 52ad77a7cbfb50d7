"""A sender that signs its messages like SNS, with a certificate of its own.

Owns: the two versions of the signature, over the fields that SNS signs. Never: sends anything.
"""

from __future__ import annotations

import base64
import datetime as dt

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from receivers import HttpReceiver

TOPIC = "arn:aws:sns:eu-central-1:123456789012:incoming"


class Signer:
    """Signs; the receiver serves its certificate, which ends in `days`."""

    def __init__(self, receiver: HttpReceiver, name: str = "cert", days: int = 1):
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sns.test")])
        now = dt.datetime.now(dt.timezone.utc)
        certificate = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(subject)
            .public_key(self.key.public_key()).serial_number(1)
            .not_valid_before(now - dt.timedelta(days=9)).not_valid_after(now + dt.timedelta(days=days))
            .sign(self.key, hashes.SHA256())
        )  # fmt: skip
        receiver.files[f"/{name}.pem"] = certificate.public_bytes(serialization.Encoding.PEM)
        self.host, self.name = receiver.host, name

    def sign(self, kind: str, message: str, version: str = "2", topic: str = TOPIC, **more: str) -> dict:
        """A message of this kind; `more` are its other fields."""
        body = {
            "Type": kind, "MessageId": "1", "TopicArn": topic, "Message": message,
            "Timestamp": "2026-11-25T00:00:00Z", "SignatureVersion": version,
            "SigningCertURL": f"http://{self.host}/{self.name}.pem", **more,
        }  # fmt: skip
        signed = ["Message", "MessageId", "Subject", "Timestamp", "TopicArn", "Type"]
        if kind != "Notification":
            signed = ["Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"]
        text = "".join(f"{name}\n{body[name]}\n" for name in signed if name in body)
        algorithm = hashes.SHA1() if version == "1" else hashes.SHA256()
        signature = self.key.sign(text.encode(), padding.PKCS1v15(), algorithm)
        return body | {"Signature": base64.b64encode(signature).decode()}
