"""Keys and requests, in a process of their own: the certificate library is needed for a second in a year.

`python -m clients.agent.keys make FOLDER CERTIFICATE` writes a new key and a signing request for the same name into
the folder. `… accept FOLDER` reads the certs-only PKCS#7 answer (DER) from standard input and stores the certificate,
if it is for that key and name. What goes wrong is one line on standard error and status 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs7
from cryptography.x509.oid import NameOID

from clients.device.identity import CERTIFICATE, KEY, REQUEST
from clients.device.state import write_atomically


def make(folder: Path, current: Path) -> None:
    """A new EC P-256 key, readable by nobody else, and the request for it."""
    os.umask(0o077)
    name = x509.load_pem_x509_certificates(current.read_bytes())[0].subject
    common = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(common)).sign(key, hashes.SHA256())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_atomically(folder / KEY, pem)
    write_atomically(folder / REQUEST, request.public_bytes(serialization.Encoding.DER))


def accept(folder: Path, answer: bytes) -> None:
    """Store the certificate of the answer that is for our key and name."""
    key = serialization.load_pem_private_key((folder / KEY).read_bytes(), None)
    request = x509.load_der_x509_csr((folder / REQUEST).read_bytes())
    wanted = _name(request.subject)
    for certificate in pkcs7.load_der_pkcs7_certificates(answer):
        if certificate.public_key() == key.public_key() and _name(certificate.subject) == wanted:
            write_atomically(folder / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
            return
    raise ValueError("no certificate of the answer is for this key and name")


def _name(subject: x509.Name) -> list[str]:
    return [str(part.value) for part in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]


def main(arguments: list[str]) -> int:
    """See the module."""
    try:
        match arguments:
            case ["make", folder, certificate]:
                make(Path(folder), Path(certificate))
            case ["accept", folder]:
                accept(Path(folder), sys.stdin.buffer.read(1024 * 1024))
            case _:
                sys.stderr.write("usage: python -m clients.agent.keys make FOLDER CERTIFICATE | accept FOLDER\n")
                return 2
    except (OSError, ValueError, IndexError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
