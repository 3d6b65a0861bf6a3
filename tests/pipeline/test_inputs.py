"""A collection is found wherever it lies: in folders, behind globs, in manifests, in tar and Parquet files."""

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from urllib.parse import quote_plus

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import containers, index
from pipeline.cluster import spread
from pipeline.config import ConfigurationError, IndexSettings, StorageSettings
from pipeline.containers import Images
from pipeline.plan import PlannedImage
from pipeline.reader import ChangedError, Reader
from pipeline.storage import Store
from tests.conftest import draw_image, spoil
from tests.pipeline.test_index import Updated, update


def names(found: Updated) -> list[str]:
    return sorted(row["uri"].rpartition("/")[2] for row in found.images)


def sizes(found: Updated) -> list[tuple[int, int]]:
    return sorted((row["width"], row["height"]) for row in found.images)


def content(row: dict, column: str | None = None) -> bytes:
    """What a worker gets for an image."""
    return Images(Reader(StorageSettings()), column).fetch(PlannedImage(**row))


def files_of(collection: Path) -> list[Path]:
    return sorted(path for path in collection.rglob("*") if path.is_file())


def pack_tar(path: Path, collection: Path, sidecars: bool = True) -> Path:
    """A WebDataset shard: each image, and a JSON file beside it."""
    with tarfile.open(path, "w") as tar:
        for file in files_of(collection):
            tar.add(file, arcname=str(file.relative_to(collection)))
            if sidecars:
                member = tarfile.TarInfo(str(file.relative_to(collection).with_suffix(".json")))
                member.size = 2
                tar.addfile(member, io.BytesIO(b"{}"))
    return path


def pack_parquet(path: Path, collection: Path, hugging_face: bool, column: str = "image", rows: int = 5) -> Path:
    data = [file.read_bytes() for file in files_of(collection)]
    values = [{"bytes": one, "path": f"{n}.jpg"} for n, one in enumerate(data)] if hugging_face else data
    pq.write_table(pa.table({"label": range(len(data)), column: values}), path, row_group_size=rows)
    return path


def test_an_image_in_a_tar_has_its_members_name_and_its_own_bytes(collection, tmp_path):
    tar = pack_tar(tmp_path / "shard-000.tar", collection)
    found = update(tar, output=tmp_path / "out")
    assert found.index.skipped == {".json in a tar": 12}
    for row, file in zip(found.images, files_of(collection), strict=True):
        assert row["uri"] == f"file://{tar}#{file.relative_to(collection)}"
        assert row["file"] == f"file://{tar}"
        assert content(row) == file.read_bytes()
    again = update(tar, output=tmp_path / "out")
    assert (again.index.opened, again.images) == (0, found.images)


@pytest.mark.parametrize("hugging_face", [False, True])
def test_an_image_in_a_parquet_file_has_its_row(collection, tmp_path, hugging_face, monkeypatch):
    monkeypatch.setattr(containers, "KEPT_BYTES", 10_000)
    parquet = pack_parquet(tmp_path / "train.parquet", collection, hugging_face)
    found = update(parquet, output=tmp_path / "out")
    files = files_of(collection)
    assert [row["uri"] for row in found.images] == [f"file://{parquet}#{number:09}" for number in range(12)]
    images = Images(Reader(StorageSettings()), None)
    for number in [3, 11, 0, 4, 5, 10, 2]:  # across row groups, of which not all are kept
        assert images.fetch(PlannedImage(**found.images[number])) == files[number].read_bytes()
    assert len(images.groups.kept) < 3
    assert images.bound() > 10_000


def test_a_column_of_images_is_found_by_its_name_or_by_the_one_that_is_given(collection, tmp_path):
    parquet = pack_parquet(tmp_path / "x.parquet", collection, False, column="picture")
    with pytest.raises(ConfigurationError, match=r"which column has the URIs\? It has label, picture"):
        update(parquet, output=tmp_path / "out")
    found = update(parquet, output=tmp_path / "out", image_column="picture")
    assert len(found.images) == 12
    assert content(found.images[7], "picture") == files_of(collection)[7].read_bytes()


def test_files_of_images_lie_among_images(collection, tmp_path):
    """img2dataset puts a Parquet file of URLs beside each tar: it holds no image."""
    pack_tar(collection / "00000.tar", collection / "part 0", sidecars=False)
    pq.write_table(pa.table({"url": ["http://x"]}), collection / "00000.parquet")
    pack_parquet(collection / "more.parquet", collection / "part 1", hugging_face=True)
    found = update(collection, output=tmp_path / "out")
    assert len(found.images) == 12 + 4 + 4
    assert found.index.skipped == {"a Parquet file without images": 1}
    assert update(collection, output=tmp_path / "out").index.opened == 1  # which may have the column of another run
    draw_image(collection / "part 0/new.png", 20, 20)
    pack_tar(collection / "00000.tar", collection / "part 0", sidecars=False)
    again = update(collection, output=tmp_path / "out")
    assert (again.index.opened, len(again.images)) == (3, 13 + 5 + 4)  # the image too, and the tar, which changed


def test_patterns_choose_among_members_too(collection, tmp_path):
    pack_tar(collection / "a.tar", collection)
    assert len(update(collection, output=tmp_path / "out").images) == 24
    some = update(collection, output=tmp_path / "out", include=["*.png"], exclude=["a.tar#part 0/*"])
    assert Counter("#" in row["uri"] for row in some.images) == {False: 3, True: 2}
    assert some.index.opened == 0
    assert len(update(collection, output=tmp_path / "out", exclude=["*.tar"]).images) == 12


def test_what_is_wrong_with_a_file_of_images_is_a_row_and_loses_no_other(collection, tmp_path):
    spoil(collection)
    whole = pack_tar(tmp_path / "whole.tar", collection, sidecars=False).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/text.tar").write_text("This is no tar. " * 100)
    (tmp_path / "in/empty.tar").touch()
    (tmp_path / "in/text.parquet").write_text("Neither is this a Parquet file.")
    (tmp_path / "in/ended.tar").write_bytes(whole.rstrip(b"\0") + bytes(512 - len(whole.rstrip(b"\0")) % 512))
    damaged = bytearray(whole)
    start = whole.index(b"part 1/")
    damaged[start : start + 200] = b"x" * 200
    (tmp_path / "in/damaged.tar").write_bytes(damaged)
    pq.write_table(pa.table({"image": [b"", None, b"text"]}), tmp_path / "in/odd.parquet")
    found = update(tmp_path / "in", output=tmp_path / "out")
    errors = {row["uri"].rpartition("/in/")[2]: row["error"] for row in found.images if row["error"]}
    assert "cut off at byte" in errors.pop("cut.tar")
    assert "not a tar" in errors.pop("text.tar")
    assert "not a tar" in errors.pop("empty.tar")
    assert "not a parquet file" in errors.pop("text.parquet")
    assert "damaged" in errors.pop("damaged.tar")
    assert "no image bytes" in errors.pop("odd.parquet#000000001")
    assert all("empty" in errors.pop(f"odd.parquet#00000000{n}") or True for n in (0, 2))
    assert all(name.startswith(("damaged.tar#", "ended.tar#", "cut.tar#")) for name in errors)
    assert sum(row["uri"].startswith(f"file://{tmp_path}/in/ended.tar#") for row in found.images) == 15
    assert all("\n" not in error for error in errors.values())
    assert update(tmp_path / "in", output=tmp_path / "out").index.opened == 0


def test_what_is_hostile_in_a_file_of_images_costs_only_itself(collection, tmp_path):
    (tmp_path / "in").mkdir()
    png = bytearray((collection / "part 1/image-01.png").read_bytes())
    png[16:20] = b"\xff" * 4  # its width
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (tmp_path / "in/wide.png").write_bytes(png)
    (tmp_path / "in/short.webp").write_bytes(b"RIFF\x20\0\0\0WEBPVP8X")
    member = tarfile.TarInfo("x.jpg").tobuf()
    negative = member[:124] + b"\xff" * 10 + b"\xfe\0" + member[136:]  # a size of -512
    (tmp_path / "in/endless.tar").write_bytes(with_checksum(negative) + bytes(1024))
    parquet = pack_parquet(tmp_path / "x.parquet", collection, False)
    page = pq.read_metadata(parquet).row_group(0).column(1).data_page_offset
    damaged = bytearray(parquet.read_bytes())
    damaged[page : page + 20] = b"x" * 20
    (tmp_path / "in/page.parquet").write_bytes(damaged)
    pq.write_table(pa.table([[b"a"], [b"b"]], names=["image", "image"]), tmp_path / "in/two.parquet")
    with tarfile.open(tmp_path / "in/links.tar", "w") as tar:
        tar.add(collection / "part 1/image-01.png", arcname="a.png")
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
    found = update(tmp_path / "in", output=tmp_path / "out")
    errors = {row["uri"].rpartition("/in/")[2]: row["error"] for row in found.images}
    assert errors.pop("links.tar#a.png") is None
    assert set(errors) == {"wide.png", "short.webp", "endless.tar", "page.parquet"}
    assert all(errors.values())
    assert found.index.skipped == {"a Parquet file without images": 1, "a link or the like in a tar": 1}


def with_checksum(header: bytes) -> bytes:
    """A tar header whose checksum is right."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    return header[:148] + b"%06o\0 " % total + header[156:]


def test_a_file_of_images_that_is_gone_is_a_row(collection, tmp_path):
    uris = [str(collection / "part 1/image-01.png"), str(tmp_path / "gone.tar"), "foo://x/y.jpg"]
    (tmp_path / "list.csv").write_text("\n".join(["url", *uris]))
    for opened in (3, 2):  # what could not be opened is tried again, and stops nothing
        found = update(tmp_path / "list.csv", output=tmp_path / "out")
        assert found.index.opened == opened
        rows = {row["uri"].rpartition("/")[2]: row for row in found.images}
        assert rows["gone.tar"]["format"] == "tar"
        assert "is gone" in rows["gone.tar"]["error"]
        assert (rows["y.jpg"]["etag"], rows["y.jpg"]["error"]) == ("", None)
        assert rows["image-01.png"]["width"]


def test_a_name_that_a_tar_has_twice_is_the_last_one(collection, tmp_path):
    """As when it is unpacked."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("part 0/image-00.jpg", "part 1/image-01.png"):
            tar.add(collection / name, arcname="same.jpg")
    (found,) = update(tmp_path / "x.tar", output=tmp_path / "out").images
    assert content(found) == (collection / "part 1/image-01.png").read_bytes()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("part 0/*.jpg", 1), ("part [01]", 8), ("*/image-0?.*", 10), ("**/*.png", 3), ("part*", 12), ("x*/**", 0)],
)
def test_a_glob_names_images_and_folders(collection, tmp_path, pattern, expected):
    if not expected:
        with pytest.raises(ConfigurationError, match="no images found"):
            update(collection / pattern, output=tmp_path / "out")
        return
    assert len(update(collection / pattern, output=tmp_path / "out").images) == expected


def test_a_folder_whose_name_looks_like_a_glob_is_itself(collection, tmp_path):
    collection.rename(tmp_path / "photos [2026]")
    assert len(update(tmp_path / "photos [2026]", output=tmp_path / "out [1]").images) == 12
    assert update(tmp_path / "photos [2026]", output=tmp_path / "out [1]").index.opened == 0


def test_several_inputs_are_one_collection_and_each_image_counts_once(collection, tmp_path):
    found = update(collection / "part 0", collection / "part 1", collection / "p*/*.jpg", output=tmp_path / "out")
    assert len(found.images) == 9
    assert found.index.skipped == {"listed twice": 2}


def table_of(collection: Path, form: str, path: Path) -> Path:
    """A manifest in which one URI is absolute, one relative, one a plain path."""
    uris = [str(file) if n % 3 else str(file.relative_to(path.parent)) for n, file in enumerate(files_of(collection))]
    uris[0] = f"file://{collection}/{files_of(collection)[0].relative_to(collection)}"
    uris += [None, str(path.parent / "gone.jpg")]
    match form:
        case "csv":
            path.write_text("id,link\n" + "\n".join(f'{n},"{uri or ""}"' for n, uri in enumerate(uris)))
        case "csv.gz":
            path.write_bytes(gzip.compress(("link\n" + "\n".join(uri or '""' for uri in uris)).encode()))
        case "jsonl":
            path.write_text("\n".join(json.dumps({"n": {"deep": n}, "link": uri}) for n, uri in enumerate(uris)))
        case "parquet":
            pq.write_table(pa.table({"n": range(len(uris)), "link": uris}), path)
    return path


@pytest.mark.parametrize("form", ["csv", "csv.gz", "jsonl", "parquet"])
def test_a_manifest_names_images_by_a_column(collection, tmp_path, form):
    manifest = table_of(collection, form, tmp_path / f"list.{form}")
    with pytest.raises(ConfigurationError, match=r"which column has the URIs.*link.*--uri-column"):
        update(manifest, output=tmp_path / "out")
    found = update(manifest, output=tmp_path / "out", uri_column="link")
    assert names(found) == sorted(["gone.jpg", *names(update(collection, output=tmp_path / "other"))])
    assert found.index.opened == 13
    for row in found.images:
        assert row["uri"].startswith("file:///")
        if row["uri"].endswith("gone.jpg"):
            assert (row["etag"], row["width"]) == ("", None)  # the worker will say that it is missing
        else:
            assert content(row) == Path(row["uri"].removeprefix("file://")).read_bytes()
    again = update(manifest, output=tmp_path / "out", uri_column="link")
    assert again.index.opened == 1  # what is gone may be back
    assert len(update(manifest, output=tmp_path / "out", uri_column="link", include=["*/part 0/*"]).images) == 4


def test_a_manifest_with_etags_tells_what_changed(collection, tmp_path):
    listed = [
        (entry.uri, entry.etag, entry.bytes)
        for _, entry in Store(str(collection), StorageSettings()).listing()
        if entry
    ]
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps(dict(zip(("url", "etag", "size"), one, strict=True))) for one in listed)
    )
    assert update(tmp_path / "list.jsonl", output=tmp_path / "out").index.opened == 12
    assert update(tmp_path / "list.jsonl", output=tmp_path / "out").index.opened == 0
    assert update(collection, output=tmp_path / "out").index.opened == 0


@pytest.mark.parametrize("uri", ["https://me:TOPSECRET@host/x.jpg", "https://host/x.jpg?X-Amz-Signature=TOPSECRET"])
def test_a_manifest_with_a_password_stops_with_one_line(tmp_path, uri):
    (tmp_path / "list.csv").write_text(f"url\n{uri}\n")
    with pytest.raises(ConfigurationError, match="credentials") as caught:
        update(tmp_path / "list.csv", output=tmp_path / "out")
    assert "TOPSECRET" not in str(caught.value)


@pytest.mark.parametrize("form", ["CSV", "Parquet"])
def test_an_s3_inventory_is_a_listing(bucket, collection, tmp_path, form):
    filesystem, name = fsspec.filesystem("s3"), bucket.removeprefix("s3://")
    filesystem.put(f"{collection}/", f"{bucket}/photos ü/", recursive=True)
    rows = []
    for path, found in filesystem.find(f"{bucket}/photos ü", detail=True).items():
        key = path.removeprefix(f"{name}/")
        rows += [(key, found["Size"], found["ETag"].strip('"'), "true", "false"), (key, 7, "older", "false", "false")]
    rows.append(("deleted.jpg", None, None, "true", "true"))
    if form == "CSV":
        lines = [
            ",".join(f'"{value}"' for value in (name, quote_plus(key), *("" if one is None else one for one in rest)))
            for key, *rest in rows
        ]
        data, part = gzip.compress("\n".join(lines).encode()), "data.csv.gz"
        schema = "Bucket, Key, Size, ETag, IsLatest, IsDeleteMarker"
    else:
        columns = ["key", "size", "e_tag", "is_latest", "is_delete_marker"]
        table = pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))
        flags = [(column, pa.array([value == "true" for value in table[column].to_pylist()])) for column in columns[3:]]
        table = table.drop(columns[3:]).append_column("bucket", pa.array([name] * len(rows)))
        for column, values in flags:
            table = table.append_column(column, values)
        pq.write_table(table, buffer := io.BytesIO())
        data, part, schema = buffer.getvalue(), "data.parquet", "message s3.inventory {}"
    filesystem.pipe_file(f"{bucket}/inventory/{part}", data)
    about = {
        "fileFormat": form,
        "fileSchema": schema,
        "destinationBucket": f"arn:aws:s3:::{name}",
        "files": [{"key": f"inventory/{part}"}],
    }
    filesystem.pipe_file(f"{bucket}/inventory/manifest.json", json.dumps(about).encode())
    found = update(f"{bucket}/inventory/manifest.json", output=tmp_path / "out")
    assert [row["uri"] for row in found.images] == sorted(
        f"s3://{path}" for path in filesystem.find(f"{bucket}/photos ü")
    )
    assert all(row["width"] for row in found.images)
    assert update(f"{bucket}/photos ü", output=tmp_path / "out").index.opened == 0


def test_an_inventory_that_cannot_be_used_says_why(tmp_path):
    for text, expected in [
        ("{}", "not the manifest"),
        ("no", "not the manifest"),
        ('{"fileFormat": "ORC", "files": [], "destinationBucket": "b"}', "as Parquet or CSV"),
    ]:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ConfigurationError, match=expected):
            update(tmp_path / "manifest.json", output=tmp_path / "out")


def test_a_bucket_is_listed_page_by_page_and_its_files_of_images_are_read_by_ranges(
    bucket, collection, tmp_path, monkeypatch
):
    filesystem = fsspec.filesystem("s3")
    tar = pack_tar(tmp_path / "x.tar", collection)
    filesystem.put(str(tar), f"{bucket}/in/x.tar")
    filesystem.put(str(pack_parquet(tmp_path / "y.parquet", collection, True)), f"{bucket}/in/y.parquet")
    filesystem.put(f"{collection}/", f"{bucket}/in/photos/", recursive=True)
    pages = []
    call = type(filesystem).call_s3

    def two_a_page(self, method: str, **options: object) -> object:
        pages.append(method)
        return (
            call(self, method, MaxKeys=2, **options) if method == "list_objects_v2" else call(self, method, **options)
        )

    monkeypatch.setattr(type(filesystem), "call_s3", two_a_page)
    found = update(f"{bucket}/in", output=tmp_path / "out")
    assert pages.count("list_objects_v2") == 2 * 7  # over plain HTTP each is asked for twice
    assert len(found.images) == 36
    for row in found.images:
        assert content(row) in [file.read_bytes() for file in files_of(collection)]
    assert len(update(f"{bucket}/in/ph*/part*1/*.jpg", output=tmp_path / "out").images) == 1
    assert len(update(f"{bucket}/in/*.tar", f"{bucket}/in/photos/part 0/", output=tmp_path / "out").images) == 16


def test_a_tar_that_is_replaced_between_index_and_fetch_is_not_mixed_up(bucket, collection, tmp_path):
    filesystem = fsspec.filesystem("s3")
    filesystem.put(str(pack_tar(tmp_path / "x.tar", collection)), f"{bucket}/x.tar")
    row = update(f"{bucket}/x.tar", output=tmp_path / "out").images[5]
    filesystem.put(str(pack_tar(tmp_path / "x.tar", collection / "part 1")), f"{bucket}/x.tar")
    with pytest.raises(ChangedError):
        content(row)


def test_an_index_of_very_many_is_spread_over_the_cluster(collection, tmp_path, monkeypatch):
    """On a real Ray."""
    tar = pack_tar(tmp_path / "x.tar", collection)
    monkeypatch.setattr(index, "SPREAD", 5)
    monkeypatch.setattr(index, "CHUNK", 3)
    settings = IndexSettings(input=str(collection), output=str(tmp_path))
    found = update(collection, tar, output=tmp_path / "spread", spread=partial(spread, settings))
    monkeypatch.setattr(index, "SPREAD", 10**6)
    assert found.images == update(collection, tar, output=tmp_path / "here").images
    assert found.index.skipped == {".json in a tar": 12}
