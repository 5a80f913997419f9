"""Verifying clear-signed OpenPGP messages against the archive's own keys (RFC 9580, 7).

Cryptography is Sequoia's (`pysequoia`); this module decides whose signature counts, and hands out
only the bytes that were signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from vmlab.images.errors import UntrustedArchive

_MESSAGE_BYTES_AT_MOST = 16 << 20

# Fingerprints of the certificates in keys/, where README.md says whence they come.
ARCHIVE_KEYS = {
    "debian-12-automatic.asc": "b8b80b5b623eab6ad8775c45b7c5d7d6350947f8",
    "debian-12-security.asc": "05ab90340c0c5e797f44a8c8254cf3b5aec0a8f0",
    "debian-12-stable.asc": "4d64fec119c2029067d6e791f8d2585b8783d481",
    "debian-13-automatic.asc": "04b54c3cdca79751b16bc6b5225629df75b188bd",
    "debian-13-security.asc": "5e04a1e3223a19a20706e20f9904613d4cce68c6",
    "debian-13-stable.asc": "41587f7db8c774bccf131416762f67a0b2c39de4",
}


@dataclass(frozen=True)
class Verified:
    """What was signed, and the fingerprints (lower-case hexadecimal) of who signed it."""

    text: bytes
    signers: tuple[str, ...]


def archive_keys() -> tuple[bytes, ...]:
    """Debian's archive keys that come with vmlab.

    Raises:
        UntrustedArchive: a key file of this installation is not the key it has to be.
    """
    from pysequoia import Cert

    keys = []
    folder = resources.files("vmlab.images.debian") / "keys"
    for name, fingerprint in ARCHIVE_KEYS.items():
        data = (folder / name).read_bytes()
        found = Cert.from_bytes(data).fingerprint
        if found != fingerprint:
            raise UntrustedArchive(
                f"the archive key {name} of this installation has the fingerprint {found}, "
                f"not {fingerprint}",
                hint="install vmlab again from a source that you trust",
            )
        keys.append(data)
    return tuple(keys)


def binary_keyring(keys: tuple[bytes, ...]) -> bytes:
    """Keyrings as one without armor, the only form that every program reads."""
    from pysequoia import Cert

    return b"".join(
        bytes(certificate) for keyring in keys for certificate in Cert.split_bytes(keyring)
    )


def verify(message: bytes, keys: tuple[bytes, ...], *, source: str) -> Verified:
    """The text of a signed message, if one of `keys` has signed it.

    Args:
        message: A clear-signed message, as `InRelease` is.
        keys: OpenPGP keyrings, binary or armored.
        source: The message's name, for errors.

    Raises:
        UntrustedArchive: the message is not signed, was changed, or was signed by other keys.
    """
    import pysequoia

    hint = (
        "the mirror, or something on the way to it, serves a changed file; try another mirror. "
        "For an archive with keys of its own, give its keyring (VMLAB_DEBIAN_KEYRING)"
    )
    if len(message) > _MESSAGE_BYTES_AT_MOST or not message.startswith(b"-----BEGIN PGP SIGNED"):
        raise UntrustedArchive(f"{source} is not a clear-signed OpenPGP message", hint=hint)
    certificates = []
    for keyring in keys:
        try:
            certificates.extend(pysequoia.Cert.split_bytes(keyring))
        except Exception as error:
            raise UntrustedArchive(
                f"a keyring for {source} cannot be read: {_first_line(error)}",
                hint="a keyring is one or more OpenPGP certificates, binary or armored",
            ) from error
    asked: list[str] = []

    def certificates_for(ids: list[str]) -> list[pysequoia.Cert]:
        asked.extend(str(item) for item in ids)
        return certificates

    try:
        result = pysequoia.verify(bytes=message, store=certificates_for)
    except Exception as error:  # pysequoia raises RuntimeError and ValueError of many kinds
        by = f" (signed by {', '.join(asked)})" if asked else ""
        raise UntrustedArchive(
            f"{source} has no valid signature of a known archive key{by}: {_first_line(error)}",
            hint=hint,
        ) from error
    signers = tuple(sorted({signature.certificate for signature in result.valid_sigs}))
    if not signers or result.bytes is None:
        raise UntrustedArchive(f"{source} has no valid signature", hint=hint)
    return Verified(bytes(result.bytes), signers)


def _first_line(error: Exception) -> str:
    """The message without the stack that Sequoia puts below it."""
    return str(error).split("\n", 1)[0]
