"""Archives: what unpacks, and that hostile and damaged ones are refused, leaving nothing."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store.archive import ARCHIVE_FILE, unpack
from adapters_store.base_spec import BaseSpec
from adapters_store.errors import AdapterInvalid, UploadTooLarge
from adapters_store.sandbox import SandboxLimits
from adapters_store.upload import Staging, UploadLimits

from .conftest import fill_disk

Pack = Callable[[Path, str], bytes]


def pack_tar(folder: Path, inside: str, mode: str = "w:") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        archive.add(folder, arcname=inside or ".")
    return buffer.getvalue()


def pack_tar_gz(folder: Path, inside: str) -> bytes:
    return pack_tar(folder, inside, "w:gz")


def pack_zip(folder: Path, inside: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.iterdir():
            archive.write(path, f"{inside}/{path.name}" if inside else path.name)
    return buffer.getvalue()


PACKERS = pytest.mark.parametrize("pack", [pack_tar, pack_tar_gz, pack_zip])


def chunked(data: bytes, size: int = 1000) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def refused(staging: Staging, data: bytes) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as caught:
        staging.add_archive("upload.tar", [data])
    return caught.value


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@PACKERS
@pytest.mark.parametrize("inside", ["", "my-adapter"])
def test_a_packed_peft_folder_is_accepted(
    staging: Staging, adapter: Path, base: BaseSpec, pack: Pack, inside: str
) -> None:
    staging.add_archive("whatever.bin", chunked(pack(adapter, inside)))
    assert staging.validate(base, 16).manifest.rank == 4


@PACKERS
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_archives_are_refused(
    staging: Staging, adapter: Path, base: BaseSpec, pack: Pack, keep: float
) -> None:
    data = pack(adapter, "")
    if pack is pack_tar:  # a plain tar ends in padding: cut into its contents
        data = data[: data.index(b"README.md")]

    def upload() -> None:
        staging.add_archive("upload.tar", [data[: int(len(data) * keep)]])
        staging.validate(base, 16)

    with pytest.raises(AdapterInvalid) as caught:
        upload()
    assert caught.value.file is not None


def test_a_damaged_gzip_is_refused(staging: Staging, adapter: Path) -> None:
    data = bytearray(pack_tar_gz(adapter, ""))
    data[-6] ^= 0xFF  # its checksum
    assert "damaged" in refused(staging, bytes(data)).reason


@pytest.mark.parametrize("name", ["../adapter_config.json", "/adapter_config.json", "a/../../adapter_config.json",
                                  "a/b/adapter_config.json", "a\\..\\adapter_config.json"])  # fmt: skip
def test_paths_outside_the_archive_are_refused(staging: Staging, tmp_path: Path, name: str) -> None:
    refused(staging, tar_of((tarfile.TarInfo(name), b"{}")))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "{}")
    with Staging(tmp_path / "zip") as another:
        refused(another, buffer.getvalue())
    assert not list(tmp_path.rglob("adapter_config.json"))


@pytest.mark.parametrize(("name", "reason"), [("", "no name"), ("\0adapter_config.json", "NUL"), ("a/\0x", "NUL")])
def test_a_zip_entry_without_a_name_is_refused(staging: Staging, name: str, reason: str) -> None:
    buffer, entry = io.BytesIO(), zipfile.ZipInfo("x")
    entry.filename = name
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(entry, "{}")
    assert reason in refused(staging, buffer.getvalue()).reason


def test_a_zip_name_with_nul_is_refused(staging: Staging) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("adapter_config.json-txt", "{}")
    assert "NUL" in refused(staging, buffer.getvalue().replace(b".json-txt", b".json\0txt")).reason


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(staging: Staging, kind: bytes) -> None:
    member = tarfile.TarInfo("adapter_config.json")
    member.type, member.linkname = kind, "/etc/passwd"
    error = refused(staging, tar_of((member, b"")))
    assert error.file == "adapter_config.json"
    assert "regular file" in error.reason


def test_a_symlink_in_a_zip_is_refused(staging: Staging) -> None:
    member = zipfile.ZipInfo("adapter_config.json")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, "/etc/passwd")
    assert "regular file" in refused(staging, buffer.getvalue()).reason


def test_the_same_name_twice_is_refused(staging: Staging) -> None:
    member = tarfile.TarInfo("adapter_config.json")
    assert "twice" in refused(staging, tar_of((member, b"{}"), (member, b"{}"))).reason


def test_a_pickle_in_an_archive_is_refused(staging: Staging) -> None:
    error = refused(staging, tar_of((tarfile.TarInfo("a/adapter_model.bin"), b"\x80\x04")))
    assert error.file == "adapter_model.bin"
    assert "safe_serialization" in error.reason


def test_a_nested_archive_is_refused(staging: Staging) -> None:
    assert refused(staging, tar_of((tarfile.TarInfo("inner.tar"), b""))).file == "inner.tar"


@PACKERS
def test_a_bomb_is_refused_by_its_ratio(staging: Staging, adapter: Path, pack: Pack) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(bytes(64 << 20))
    data = pack(adapter, "")
    if pack is pack_tar:
        staging.add_archive("plain.tar", [data])  # it does not grow, so it is no bomb
    else:
        assert "times its own size" in refused(staging, data).reason


@PACKERS
def test_more_bytes_than_allowed_are_refused(tmp_path: Path, adapter: Path, pack: Pack) -> None:
    limits = UploadLimits(max_unpacked_bytes=4000)
    with Staging(tmp_path / "s", limits) as staging, pytest.raises(UploadTooLarge, match="unpacks to"):
        staging.add_archive("a.tar", [pack(adapter, "")])
    assert list((tmp_path / "s").iterdir()) == []


def test_an_archive_over_the_upload_limit_is_refused(tmp_path: Path) -> None:
    with Staging(tmp_path, UploadLimits(max_upload_bytes=4000)) as staging, pytest.raises(UploadTooLarge):
        staging.add_archive("a.tar", [bytes(1000)] * 5)


def test_too_many_entries_are_refused(staging: Staging) -> None:
    members = [(tarfile.TarInfo(f"a/._{i}"), b"") for i in range(300)]
    assert "entries" in refused(staging, tar_of(*members)).reason


def test_a_pax_header_that_fills_memory_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("adapter_config.json")
    member.pax_headers = {"comment": "x" * (48 << 20)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT, compresslevel=1) as archive:
        archive.addfile(member)
    limits = UploadLimits(sandbox=SandboxLimits(memory_bytes=64 << 20))
    with Staging(tmp_path, limits) as staging:
        assert "more time or memory" in refused(staging, buffer.getvalue()).reason


def test_an_encrypted_zip_is_refused(staging: Staging, adapter: Path) -> None:
    data = bytearray(pack_zip(adapter, ""))
    start = 0
    while (start := data.find(b"PK\x01\x02", start)) >= 0:  # set the flag in each entry of the directory
        data[start + 8] |= 1
        start += 4
    assert "encrypted" in refused(staging, bytes(data)).reason


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_of_an_unusual_compression_is_refused_by_member(staging: Staging, compression: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("adapter_config.json", b"{}")
    error = refused(staging, buffer.getvalue())
    assert error.file == "adapter_config.json"
    assert "unusual compression" in error.reason


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x04]", b"BZh91AY&SY", b"PK\x05\x06", b"\x1f\x8b\x08"])
def test_what_is_no_archive_is_refused(staging: Staging, data: bytes) -> None:
    assert refused(staging, data).file == "upload.tar"


@PACKERS
def test_a_full_disk_is_no_damage_of_the_archive(
    tmp_path: Path, adapter: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ARCHIVE_FILE).write_bytes(pack(adapter, ""))
    fill_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        unpack(tmp_path, {"name": "upload.tar", "max_bytes": 1 << 30})


def test_files_beside_an_archive_are_refused(staging: Staging, adapter: Path) -> None:
    staging.add_archive("a.tar", [pack_tar(adapter, "")])
    with pytest.raises(AdapterInvalid, match="either files or one archive"):
        staging.add_file("patchbay.json", [b"{}"])
    with pytest.raises(AdapterInvalid, match="either files or one archive"):
        staging.add_archive("b.tar", [pack_tar(adapter, "")])


def test_mac_resource_files_are_ignored(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    (adapter / "._adapter_config.json").write_bytes(b"mac")
    (adapter / ".DS_Store").write_bytes(b"mac")
    buffer = io.BytesIO(pack_zip(adapter, "adapter"))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("__MACOSX/adapter/._adapter_config.json", "mac")
        archive.writestr("__MACOSX/adapter/adapter_config.json", "mac")
    staging.add_archive("a.zip", [buffer.getvalue()])
    assert staging.validate(base, 16).manifest.rank == 4
