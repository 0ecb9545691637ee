"""Certificates and keys of a local deployment: made for one run, and deleted with it."""

from __future__ import annotations

from pathlib import Path

import trustme
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from sluiceway.transport.tls import Credentials


def new_certificates(folder: Path) -> Credentials:
    """Make a certificate for the loopback address, signed by an authority whose key is not kept."""
    authority = trustme.CA(organization_name="Sluiceway local deployment")
    issued = authority.issue_cert("127.0.0.1", "localhost")
    made = Credentials(folder / "server.pem", folder / "server.key", folder / "ca.pem")
    authority.cert_pem.write_to_path(made.root)
    issued.cert_chain_pems[0].write_to_path(made.certificate)
    write_secret(made.key, issued.private_key_pem.bytes())
    return made


def new_node_key(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a SuperNode's key pair, as `ssh-keygen -t ecdsa -b 384` does; (private, public)."""
    key = ec.generate_private_key(ec.SECP384R1())
    private, public = folder / name, folder / f"{name}.pub"
    write_secret(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return private, public


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read."""
    path.touch(mode=0o600)
    path.write_bytes(data)
