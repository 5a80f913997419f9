"""Readers of foreign files: what they read, and that nothing else than a clear error comes out."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from vmlab.images.errors import FormatError
from vmlab.images.formats import ar, control, cpio, deb, disk, kernel, modinfo, tarball
from vmlab.images.formats.compression import decompress, decompressed
from vmlab.images.formats.cpio import CpioEntry
from vmlab.images.tiny import busybox
from vmlab.machine.architecture import Architecture

Forms = dict[str, Callable[..., bytes]]
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
}


# ---------------------------------------------------------------------- compression


@pytest.mark.parametrize("kind", COMPRESSORS)
@given(data=st.binary(max_size=5000))
@settings(max_examples=20)
def test_compressed_data_comes_back(kind: str, data: bytes) -> None:
    packed = COMPRESSORS[kind](data)
    assert decompress(packed, source="x", limit=len(data)) == data


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2", "zstd"])
def test_several_streams_after_each_other_are_one(kind: str) -> None:
    packed = COMPRESSORS[kind](b"one") + COMPRESSORS[kind](b"two")
    assert decompress(packed, source="x", limit=10) == b"onetwo"


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_truncated_data_is_refused(kind: str) -> None:
    data = bytes(range(256)) * 50
    packed = COMPRESSORS[kind](data)
    for end in (len(packed) // 2, len(packed) - 1):
        if kind == "lzma" and end == len(packed) - 1:
            continue  # its last byte says nothing
        with pytest.raises(FormatError, match="name of the file"):
            decompress(packed[:end], source="name of the file", limit=1 << 20)


@pytest.mark.parametrize("kind", ["gzip", "xz", "zstd"])
def test_bomb_is_stopped_at_the_limit(kind: str) -> None:
    packed = COMPRESSORS[kind](bytes(8 << 20))
    with pytest.raises(FormatError, match="more than 1000 bytes"):
        decompress(packed, source="bomb", limit=1000)


@given(
    kind=st.sampled_from(sorted(COMPRESSORS)),
    data=st.binary(max_size=300),
    at=st.integers(0, 400),
    flip=st.integers(1, 255),
)
def test_damaged_data_is_refused_or_read_never_more(
    kind: str, data: bytes, at: int, flip: int
) -> None:
    packed = bytearray(COMPRESSORS[kind](data))
    packed[at % len(packed)] ^= flip
    try:
        decompress(bytes(packed), source="x", limit=1 << 20)
    except FormatError:
        return


@given(st.sampled_from(["gzip", "xz", "bzip2", "zstd", "lzma"]), st.binary(max_size=200))
def test_magic_followed_by_noise_is_refused(kind: str, noise: bytes) -> None:
    from vmlab.images.formats.compression import MAGICS

    with pytest.raises(FormatError):
        decompress(MAGICS[kind] + noise[:4], source="x", limit=1 << 20)
    try:
        decompress(MAGICS[kind] + noise, source="x", limit=1 << 20)
    except FormatError:
        return


# ---------------------------------------------------------------------- ar and deb


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst", ""])
def test_package_of_every_compression_is_read(tmp_path: Path, forms: Forms, suffix: str) -> None:
    package = tmp_path / "a.deb"
    package.write_bytes(
        forms["deb"]("Package: a\nVersion: 1\n", [("./etc/a", b"hello", 0o640)], suffix=suffix)
    )
    assert deb.control(package) == {"Package": "a", "Version": "1"}
    with deb.data_archive(package) as stream:
        ((entry, contents),) = [
            (entry, contents.read() if contents else b"")
            for entry, contents in tarball.entries(stream, source="a")
        ]
    assert (entry.path, entry.mode, contents) == ("etc/a", 0o640, b"hello")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("control.tar", b"")], "begins with 'control.tar'"),
        ([("debian-binary", b"3.0\n")], "unknown version"),
        ([("debian-binary", b"2.0\n")], "no data.tar"),
    ],
)
def test_archive_that_is_no_package_is_refused(
    tmp_path: Path, forms: Forms, members: list[tuple[str, bytes]], message: str
) -> None:
    package = tmp_path / "a.deb"
    package.write_bytes(forms["ar"](members))
    with pytest.raises(FormatError, match=message), deb.data_archive(package):
        pass


@given(st.binary(max_size=200))
def test_any_bytes_are_an_ar_archive_or_an_error(data: bytes) -> None:
    for stream in (data, ar.MAGIC + data):
        try:
            for member in ar.members(io.BytesIO(stream), source="x"):
                assert member.offset + member.size <= len(stream)
        except FormatError:
            continue


@given(at=st.integers(0, 4000), flip=st.integers(1, 255), cut=st.integers(0, 4000))
@settings(max_examples=150)
def test_damaged_package_is_an_error_or_a_package(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int, cut: int
) -> None:
    package = tmp_path_factory.getbasetemp() / "damaged.deb"
    data = bytearray(PACKAGE)
    data[at % len(data)] ^= flip
    package.write_bytes(data[: max(1, len(data) - cut % len(data))] if cut % 3 == 0 else data)
    try:
        deb.control(package)
        with deb.data_archive(package) as stream:
            for _, contents in tarball.entries(stream, source="x"):
                if contents is not None:
                    contents.read()
    except FormatError:
        return


def _package() -> bytes:
    def tar(name: str, data: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        return buffer.getvalue()

    out = ar.MAGIC
    for name, data in (
        ("debian-binary", b"2.0\n"),
        ("control.tar", tar("./control", b"Package: a\nVersion: 1\n")),
        ("data.tar.gz", gzip.compress(tar("./a", b"hello" * 50), mtime=0)),
    ):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    return out


PACKAGE = _package()


# ---------------------------------------------------------------------- tar


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\nb", "./../x"])
def test_path_that_leads_out_is_refused(tmp_path: Path, forms: Forms, name: str) -> None:
    data = forms["tar"]([(name, b"evil", 0o644)])
    target = tmp_path / "in" / "here"
    target.mkdir(parents=True)
    with pytest.raises(FormatError, match="unsafe path"):
        tarball.extract(io.BytesIO(data), target, source="evil.tar")
    assert list((tmp_path / "in").iterdir()) == [target]


def test_nothing_is_written_through_a_symlink(tmp_path: Path, forms: Forms) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    inside = tmp_path / "inside"
    inside.mkdir()
    for entries in (
        [("link", str(outside), 0o777), ("link/evil", b"evil", 0o644)],
        [("link", "../outside", 0o777), ("link/sub/evil", b"evil", 0o644)],
        [("file", "../outside/evil", 0o777), ("file", b"evil", 0o644)],
    ):
        try:
            tarball.extract(io.BytesIO(forms["tar"](entries)), inside, source="x")
        except FormatError as error:
            assert "no directory" in error.message
        assert list(outside.iterdir()) == []


def test_hard_link_to_the_outside_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    for target in ("../secret", "/etc/passwd", "link", "missing"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "../secret"
            archive.addfile(link)
            hard = tarfile.TarInfo("hard")
            hard.type, hard.linkname = tarfile.LNKTYPE, target
            archive.addfile(hard)
        with pytest.raises(FormatError):
            tarball.extract(io.BytesIO(buffer.getvalue()), inside, source="x")
        assert not (inside / "hard").exists()
        (inside / "link").unlink(missing_ok=True)


def test_archive_that_unpacks_to_too_much_is_stopped(tmp_path: Path, forms: Forms) -> None:
    data = forms["tar"]([("a", bytes(600), 0o644), ("b", bytes(600), 0o644)])
    with pytest.raises(FormatError, match="more than 1000 bytes"):
        tarball.extract(io.BytesIO(data), tmp_path, source="x", limit=1000)


@given(at=st.integers(0, 2047), value=st.integers(0, 255), rest=st.binary(max_size=600))
@settings(max_examples=200)
def test_damaged_tar_is_an_error_or_read(at: int, value: int, rest: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("some/file")
        info.size = 600
        archive.addfile(info, io.BytesIO(bytes(600)))
    data = bytearray(buffer.getvalue()[:2048])
    data[at] = value
    try:
        for entry, contents in tarball.entries(io.BytesIO(bytes(data) + rest), source="x"):
            assert ".." not in entry.path.split("/")
            assert not entry.path.startswith("/")
            if contents is not None:
                contents.read()
    except FormatError:
        return


# ---------------------------------------------------------------------- cpio


cpio_entries = st.lists(
    st.builds(
        CpioEntry,
        path=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
            lambda text: text != "TRAILER!!!"
        ),
        kind=st.sampled_from(["file", "symlink", "directory", "character", "block", "fifo"]),
        mode=st.integers(0, 0o7777),
        data=st.binary(max_size=50),
        device=st.tuples(st.integers(0, 255), st.integers(0, 255)),
        mtime=st.integers(0, 2**32 - 1),
    ),
    max_size=5,
)


@given(cpio_entries)
def test_cpio_is_read_as_it_was_written(entries: list[CpioEntry]) -> None:
    buffer = io.BytesIO()
    size = cpio.write(entries, buffer)
    assert size == len(buffer.getvalue())
    assert size % 512 == 0
    buffer.seek(0)
    assert list(cpio.read(buffer, source="x")) == entries


@given(cpio_entries, st.integers(0, 5000), st.integers(1, 255))
def test_damaged_cpio_is_an_error_or_read(entries: list[CpioEntry], at: int, flip: int) -> None:
    buffer = io.BytesIO()
    cpio.write(entries, buffer)
    data = bytearray(buffer.getvalue())
    data[at % len(data)] ^= flip
    for damaged in (bytes(data), bytes(data)[: at % len(data)]):
        try:
            list(cpio.read(io.BytesIO(damaged), source="x"))
        except FormatError:
            continue


def test_cpio_with_a_lying_size_is_refused_without_reserving_it() -> None:
    header = b"070701" + b"%08x" * 13 % (1, 0o100644, 0, 0, 1, 0, 0xFFFFFFF0, 0, 0, 0, 0, 2, 0)
    with pytest.raises(FormatError, match="cut short"):
        list(cpio.read(io.BytesIO(header + b"a\0" + b"tiny"), source="x", limit=1 << 40))


def test_cpio_that_holds_too_much_is_stopped() -> None:
    buffer = io.BytesIO()
    cpio.write([CpioEntry(name, "file", 0o644, bytes(600)) for name in "ab"], buffer)
    buffer.seek(0)
    with pytest.raises(FormatError, match="more than 1000 bytes"):
        list(cpio.read(buffer, source="x", limit=1000))


# ---------------------------------------------------------------------- control files


def test_paragraphs_have_fields_continuations_and_comments() -> None:
    text = "# comment\nA: 1\nB:\n x\n y\n\n\nC: 2\n"
    assert list(control.paragraphs(text, source="x")) == [{"A": "1", "B": "\nx\ny"}, {"C": "2"}]


@pytest.mark.parametrize("text", [" continues", "no colon", "A: 1\nA: 2", ": empty", "a b: c"])
def test_broken_control_file_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(FormatError, match=r"x line \d"):
        list(control.paragraphs(text, source="x"))


@given(st.text(max_size=300))
def test_any_text_is_a_control_file_or_an_error(text: str) -> None:
    try:
        for fields in control.paragraphs(text, source="x"):
            assert fields
    except FormatError:
        return


# ---------------------------------------------------------------------- modules and kernels


def test_module_tells_what_it_needs(forms: Forms) -> None:
    data = forms["module"](
        "virtio_net", "virtio,net-failover", "alias=virtio:d1v*", "softdep=pre: a-b post: c",
        "vermagic=6.1 SMP",
    )  # fmt: skip
    info = modinfo.read(data, source="virtio_net.ko")
    assert info.depends == ("virtio", "net_failover")
    assert (info.before, info.after) == (("a_b",), ("c",))
    assert info.aliases == ("virtio:d1v*",)
    assert info.vermagic == "6.1 SMP"


@given(at=st.integers(0, 400), flip=st.integers(1, 255), cut=st.integers(0, 400))
@settings(max_examples=300)
def test_damaged_module_is_an_error_or_read(at: int, flip: int, cut: int) -> None:
    data = bytearray(MODULE)
    data[at % len(data)] ^= flip
    for damaged in (bytes(data), bytes(data)[: cut % len(data)]):
        try:
            modinfo.read(damaged, source="x")
        except FormatError:
            continue


def _module() -> bytes:
    modinfo_text = b"name=x\0depends=a,b\0"
    names = b"\0.modinfo\0.shstrtab\0"
    elf = struct.pack("<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 1, 243, 1, 0, 0,
                      64 + len(modinfo_text) + len(names), 0, 64, 0, 0, 64, 3, 2)  # fmt: skip
    rows = [(0, 0, 0, 0), (1, 1, 64, len(modinfo_text)),
            (10, 3, 64 + len(modinfo_text), len(names))]  # fmt: skip
    table = b"".join(
        struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, at, size, 0, 0, 1, 0)
        for name, kind, at, size in rows
    )
    return elf + modinfo_text + names + table


MODULE = _module()


def bzimage(payload: bytes = b"", *, flags: int = 1) -> bytes:
    image = bytearray(4096)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x20E, 0x400)
    image[0x600:0x610] = b"6.5.0 (me) #1\0\0\0"
    struct.pack_into("<H", image, 0x236, flags)
    struct.pack_into("<II", image, 0x248, 4096 - 1024, len(payload))
    return bytes(image) + payload


def test_kernels_are_told_apart_by_their_headers(tmp_path: Path, forms: Forms) -> None:
    arm = bytearray(2048)
    arm[56:60] = b"ARM\x64"
    elf = struct.pack("<4sBBBB8xHH", b"\x7fELF", 2, 1, 1, 0, 2, 21) + bytes(100)
    cases = {
        "bz": (bzimage(), Architecture.X86_64, "bzImage", "6.5.0"),
        "rv": (forms["riscv"]("6.9-rc1"), Architecture.RISCV64, "Image", "6.9-rc1"),
        "rvgz": (gzip.compress(forms["riscv"]("6.9")), Architecture.RISCV64, "Image", "6.9"),
        "arm": (bytes(arm), Architecture.AARCH64, "Image", ""),
        "ppc": (elf, Architecture.PPC64LE, "vmlinux", ""),
    }
    for name, (data, architecture, form, release) in cases.items():
        (tmp_path / name).write_bytes(data)
        info = kernel.inspect(tmp_path / name)
        assert (info.architecture, info.form, info.release) == (architecture, form, release)


@pytest.mark.parametrize("data", [b"", b"hello", bytes(5000), bzimage(flags=0)])
def test_file_that_is_no_kernel_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "k").write_bytes(data)
    with pytest.raises(FormatError, match="k is"):
        kernel.inspect(tmp_path / "k")


@given(st.binary(max_size=700))
def test_any_file_is_a_kernel_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-kernel"
    setup = bzimage()[:0x206]
    for head in (b"", b"\x7fELF", b"MZ\0\0zimg", b"\x1f\x8b", setup):
        path.write_bytes(head + data)
        try:
            kernel.inspect(path)
            kernel.direct_boot(path)
        except FormatError:
            continue


def test_elf_kernel_is_taken_out_of_a_bzimage_only_if_it_can_be_entered(tmp_path: Path) -> None:
    note = struct.pack("<III", 4, 8, 18) + b"Xen\0" + bytes(8)
    path = tmp_path / "bz"
    for vmlinux, expected in ((b"\x7fELF" + note, b"\x7fELF" + note), (b"\x7fELF", None)):
        path.write_bytes(bzimage(lzma.compress(vmlinux) + struct.pack("<I", len(vmlinux))))
        assert kernel.direct_boot(path) == expected


def test_busybox_tells_its_applets(forms: Forms) -> None:
    names = busybox.applets(forms["busybox"](), source="busybox")
    assert names[:3] == ["[", "[[", "ash"]
    assert "modprobe" in names
    with pytest.raises(FormatError, match="not a busybox"):
        busybox.applets(b"\x7fELF" + bytes(5000), source="ls")


# ---------------------------------------------------------------------- disks


def qcow2(*, version: int = 3, backing: int = 0, features: int = 0) -> bytes:
    head = bytearray(512)
    head[:4] = b"QFI\xfb"
    struct.pack_into(">IQ", head, 4, version, backing)
    struct.pack_into(">Q", head, 24, 1 << 30)
    struct.pack_into(">Q", head, 72, features)
    return bytes(head)


def test_disks_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(qcow2())
    assert disk.inspect(path) == disk.DiskInfo("qcow2", 1 << 30)
    path.write_bytes(bytes(1024))
    assert disk.inspect(path) == disk.DiskInfo("raw", 1024)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (qcow2(backing=512), "needs another file"),
        (qcow2(features=4), "needs another file"),
        (qcow2(version=9), "unknown version"),
        (b"QFI\xfb", "cut short"),
        (b"KDMV" + bytes(508), "VMDK"),
        (b"", "no disk image"),
        (bytes(1000), "no disk image"),
    ],
)
def test_disk_that_cannot_be_used_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        disk.inspect(path)


@given(st.binary(max_size=200))
def test_any_file_is_a_disk_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-disk"
    qcow2 = b"QFI\xfb" + struct.pack(">IQIIQI", 3, 0, 0, 16, 1 << 20, 0)
    for head in (b"", qcow2[:4], qcow2, b"KDMV", b"\xfd7zXZ\x00", bytes(512)):
        path.write_bytes(head + data)
        try:
            disk.inspect(path)
            disk.copy(path, path.with_name("copied-disk"))
        except FormatError:
            continue


def test_copied_disk_has_holes_where_there_are_zeros(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    data = b"x" * 512 + bytes(8 << 20) + b"y" * 512 + bytes(1 << 20)
    source.write_bytes(gzip.compress(data))
    disk.copy(source, target)
    assert target.read_bytes() == data
    assert target.stat().st_blocks * 512 < 4 << 20


def test_stream_that_is_not_compressed_is_passed_on() -> None:
    assert decompressed(io.BytesIO(b"plain"), source="x").read() == b"plain"
