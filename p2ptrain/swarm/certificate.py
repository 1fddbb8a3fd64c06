"""The certificate by which a peer is known on TLS connections, and the contexts that demand the other's.

What proves who somebody is are the SHA-256 of the certificate, which the peer's signed presence record names,
and that TLS lets nobody use a certificate without its key. Python's `ssl` does not ask a client for one that
no authority has signed, so all of ours are signed by one whose key everybody knows: that signature says
nothing, and nothing rests on it.

Not covered: the cipher. Python before 3.15 leaves TLS 1.3's to OpenSSL, which takes AES-256-GCM; AES-128-GCM
encrypts 6 % faster (5.5 and 5.1 GB/s on one core with VAES), and is chosen where that can be said.
"""

from __future__ import annotations

import datetime
import hashlib
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

CIPHERS = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
_FROM, _UNTIL = datetime.datetime(2020, 1, 1), datetime.datetime(2120, 1, 1)
"""Presence records expire; certificates need not, and clocks may be wrong."""
_NOBODY = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"p2ptrain: nobody's authority").digest())


@dataclass(frozen=True)
class Credentials:
    """A fresh key with its certificate, ready to accept and to dial with."""

    fingerprint: str
    server: ssl.SSLContext
    client: ssl.SSLContext


def fingerprint_of(certificate: bytes) -> str:
    """Hex SHA-256 of a certificate in DER form."""
    return hashlib.sha256(certificate).hexdigest()


def make_credentials() -> Credentials:
    """Of a peer that has just started; the key is on disk only for as long as it takes to load it."""
    key = Ed25519PrivateKey.generate()
    authority = _certificate("nobody", _NOBODY.public_key(), authority=True)
    certificate = _certificate("p2ptrain", key.public_key(), authority=False)
    contexts = []
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:  # its owner's only
        file.write(certificate.public_bytes(Encoding.PEM))
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        file.flush()
        for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
            context = ssl.SSLContext(protocol)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False  # who it is says the fingerprint, not an address
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(Path(file.name))
            context.load_verify_locations(cadata=authority.public_bytes(Encoding.DER))
            if hasattr(context, "set_ciphersuites"):
                context.set_ciphersuites(CIPHERS)
            contexts.append(context)
    server, client = contexts
    server.num_tickets = 0  # connections are kept, not resumed
    return Credentials(fingerprint_of(certificate.public_bytes(Encoding.DER)), server, client)


def _certificate(name: str, key: Ed25519PublicKey, *, authority: bool) -> x509.Certificate:
    constraints = x509.BasicConstraints(ca=authority, path_length=0 if authority else None)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nobody")]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(constraints, critical=True)
    )
    return builder.sign(_NOBODY, None)
