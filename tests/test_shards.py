"""Shards: random access to whole, cut and broken ones, decoding, crops, documents, and the world's files."""

from __future__ import annotations

import gc
import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from benchmarks.data_problem import write_million
from simvlm.data import index, seek_points, shards, text
from simvlm.data.draws import Draws
from simvlm.data.scenes import render, sample_scene
from simvlm.data.shards import BrokenSample, ImageTextShards, decode, expand, picture
from simvlm.data.text import TextShards
from simvlm.data.transforms import least_side, random_resized_crop, resize
from simvlm.data.world import write_world

PICTURE = render(sample_scene(2))


def encoded(image, suffix="png", **options):
    content = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(content, suffix, **options)
    return content.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=1, pairs=50, documents=30, shard_size=20)
    return folder


def broken(kind, call):
    with pytest.raises(BrokenSample) as caught:
        call()
    assert caught.value.kind == kind
    return caught.value


def test_the_world_read_back(world):
    pairs = ImageTextShards(world / "pairs" / "{00000..00002}.tar")
    assert (len(pairs), pairs.cut) == (50, [])
    for i in (0, 19, 20, 49):
        sample, meta = pairs[i], pairs.metadata(i)
        assert sample.key == f"{i // 20:05d}{i % 20:04d}" == meta["key"]
        assert sample.text == meta["caption"] == pairs.text(i)
        origin = meta["scene"]
        scene = sample_scene(origin["seed"], objects=origin["objects"], split=origin["split"])
        assert np.array_equal(decode(sample.image_bytes), render(scene))
    with pytest.raises(IndexError, match="0 … 49, got 50"):
        pairs[50]


def test_the_world_is_the_same_every_time(world, tmp_path):
    manifest = write_world(tmp_path, seed=1, pairs=50, documents=30, shard_size=20, workers=2)
    assert json.loads((world / "manifest.json").read_text()) == manifest
    assert len(manifest["sha256"]) == 5
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    with pytest.raises(FileExistsError, match=r"another world \(documents/00001.jsonl.gz\)"):
        write_world(tmp_path, seed=1, pairs=50, documents=20, shard_size=20)
    with pytest.raises(ValueError, match="pairs must be at least 0, got -1"):
        write_world(tmp_path, seed=1, pairs=-1, documents=1)


# webdataset leaves the shard open, to be closed when collected.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_our_shards(world):
    ours = ImageTextShards(world / "pairs" / "00001.tar")
    theirs = list(webdataset.WebDataset(str(world / "pairs" / "00001.tar"), shardshuffle=False).decode("rgb8"))
    assert len(theirs) == len(ours) == 20
    for i, sample in enumerate(theirs):
        assert sample["__key__"] == ours[i].key
        assert sample["txt"] == ours[i].text
        assert sample["json"]["caption"] == ours[i].text
        assert np.array_equal(sample["png"], decode(ours[i].image_bytes))
    gc.collect()


def test_we_read_shards_of_webdataset(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "part/a.b/000", "jpg": encoded(PICTURE, "jpeg"), "txt": "in txt", "json": {"x": 1}})
        writer.write({"__key__": "001", "webp": encoded(PICTURE, "webp"), "json": {"caption": "in json"}, "cls": 3})
        writer.write({"__key__": "002", "seg.png": encoded(PICTURE), "jpeg": encoded(PICTURE, "jpeg"), "txt": "three"})
    pairs = ImageTextShards(tmp_path / "a.tar")
    assert [(pairs[i].key, pairs[i].text) for i in range(3)] == [
        ("part/a.b/000", "in txt"),
        ("001", "in json"),
        ("002", "three"),
    ]
    for i in range(3):
        assert np.abs(decode(pairs[i].image_bytes).astype(int) - PICTURE).mean() < 6


def test_expand(tmp_path):
    for name in ("00009.tar", "00010.tar", "00011.tar", "x[1].tar", "y.tar"):
        (tmp_path / name).touch()

    def names(pattern):
        return [os.path.basename(path) for path in expand(pattern)]

    assert names(f"{tmp_path}/{{00009..00011}}.tar") == ["00009.tar", "00010.tar", "00011.tar"]
    assert names(f"{tmp_path}/{{y,00010}}.tar") == ["y.tar", "00010.tar"]
    assert names(f"{tmp_path}/0*{{09,11}}.tar") == ["00009.tar", "00011.tar"]
    assert names(tmp_path / "x[1].tar") == ["x[1].tar"]
    assert names([f"{tmp_path}/y.tar", f"{tmp_path}/000*.tar"]) == ["y.tar", "00009.tar", "00010.tar", "00011.tar"]
    with pytest.raises(FileNotFoundError, match=r"no file matches .*00012\.tar"):
        expand(f"{tmp_path}/{{00011..00012}}.tar")
    with pytest.raises(FileNotFoundError, match="got none"):
        expand([])
    with pytest.raises(ValueError, match=r"backwards, got \{3\.\.1\}"):
        expand("{3..1}.tar")


def test_broken_samples_are_named(tmp_path):
    good = encoded(PICTURE)
    path = str(
        write_tar(
            tmp_path / "s.tar",
            [
                ("0.png", good),
                ("0.txt", b" fine \n"),
                ("1.txt", b"no picture"),
                ("2.png", good),
                ("3.png", good),
                ("3.txt", b" \n"),
                ("4.png", good),
                ("4.json", b"{"),
                ("5.png", good),
                ("5.json", b'{"caption": null}'),
                ("6.png", b""),
                ("6.txt", b"empty file"),
                ("7.png", good[:-300]),
                ("7.txt", b"cut picture"),
            ],
        )
    )
    pairs = ImageTextShards(path)
    assert len(pairs) == 8
    assert pairs[0].text == "fine"
    kinds = {1: "no image", 2: "no text", 3: "empty text", 4: "broken json", 5: "empty text", 6: "no image"}
    for i, kind in kinds.items():
        error = broken(kind, lambda i=i: pairs[i])
        assert (error.shard, error.key) == (path, str(i))
        assert str(error) == f"{kind}: sample {i} of {path}"
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    sample = pairs[7]
    error = broken("broken image", lambda: decode(sample.image_bytes, shard=sample.shard, key=sample.key))
    assert (error.shard, error.key) == (path, "7")


def test_a_shard_cut_anywhere_is_read_up_to_the_cut(tmp_path):
    image = encoded(PICTURE)
    members = [(f"{i}.{suffix}", content) for i in range(3) for suffix, content in (("png", image), ("txt", b"text"))]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    size = 512 + -(-len(image) // 512) * 512 + 1024
    for cut in (
        0,
        100,
        512,
        700,
        size - 512 + 2,
        size - 512 + 4,
        size,
        size + 1,
        2 * size - 600,
        2 * size + 600,
        3 * size,
    ):
        path = tmp_path / f"{cut}.tar"
        path.write_bytes(whole[:cut])
        pairs = ImageTextShards(path)
        assert pairs.cut == [str(path)]
        # The text is the last member: four bytes in a block of 512.
        assert len(pairs) == cut // size + (cut % size >= size - 512 + 4), cut
        assert [(pairs[i].key, pairs[i].image_bytes, pairs[i].text) for i in range(len(pairs))] == [
            (str(i), image, "text") for i in range(len(pairs))
        ]
    (tmp_path / "none.tar").write_bytes(b"not a tar" * 1000)
    assert len(ImageTextShards(tmp_path / "none.tar")) == 0


def scans(monkeypatch, module):
    """A list that grows with every shard that is scanned."""
    seen, scan = [], module.scan
    monkeypatch.setattr(module, "scan", lambda shard: seen.append(shard) or scan(shard))
    return seen


def test_the_index_is_kept_beside_the_shard_and_follows_it(tmp_path, monkeypatch):
    scanned, said = scans(monkeypatch, shards), []
    path = write_tar(tmp_path / "s.tar", [("0.png", b"x"), ("0.txt", b"one")])
    assert ImageTextShards(path, say=said.append)[0].text == "one"
    assert said == ["1 of 1 shards have no index: scanning them (`simvlm data index`: in parallel)"]
    assert ImageTextShards(path, say=said.append).where(0) == (str(path), "0")
    assert (len(scanned), len(said)) == (1, 1)
    beside = tmp_path / "s.tar.idx"
    whole = beside.read_bytes()
    for stale in (b"", b"{", whole[:20], whole[:-8], whole.replace(b'"version":"2"', b'"version":"0"')):
        assert stale != whole
        beside.write_bytes(stale)
        assert ImageTextShards(path)[0].key == "0"
    assert len(scanned) == 6
    write_tar(path, [("0.png", b"x"), ("0.txt", b"one"), ("1.png", b"y"), ("1.txt", b"two")])
    assert [ImageTextShards(path)[i].text for i in (0, 1)] == ["one", "two"]
    assert sorted(os.listdir(tmp_path)) == ["s.tar", "s.tar.idx"]


def test_a_folder_of_indices(tmp_path, monkeypatch):
    """Shards of one name in two folders have indices of their own, and none lies beside them."""
    scanned, folder = scans(monkeypatch, shards), tmp_path / "new" / "folder"
    for name in "ab":
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", [("0.png", b"x"), ("0.txt", name.encode())])
    for _ in range(2):
        pairs = ImageTextShards(f"{tmp_path}/{{a,b}}/0.tar", index=str(folder))
        assert [pairs[i].text for i in (0, 1)] == ["a", "b"]
    assert len(scanned) == len(os.listdir(folder)) == 2
    assert os.listdir(tmp_path / "a") == ["0.tar"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", [("0.png", b"x"), ("0.txt", b"one")])

    def refuse(*arguments, **options):
        raise PermissionError("read-only")

    # A mode of 0o555 would not stop root.
    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    said = []
    pairs = ImageTextShards(path, say=said.append)
    assert said[1] == (
        "index files cannot be written (read-only): they stay in memory; data.index names another folder for them"
    )
    assert pairs[0].text == pickle.loads(pickle.dumps(pairs))[0].text == "one"
    assert os.listdir(tmp_path) == ["s.tar"]


def test_a_start_reads_no_more_than_headers(tmp_path, monkeypatch):
    """A million pairs: no shard is scanned, no array read, until a sample is asked for, and then one."""
    write_million(tmp_path)
    read, once = [], index._opened
    monkeypatch.setattr(index, "_opened", lambda kept: read.append(kept.path) or once(kept))
    scanned = scans(monkeypatch, shards)
    pairs = ImageTextShards(f"{tmp_path}/*.tar")
    assert (len(pairs), scanned, read) == (1_000_000, [], [])
    assert len(pickle.dumps(pairs)) < 100_000
    assert pairs.where(420_007) == (f"{tmp_path}/00042.tar", "000420007")
    assert set(read) == {f"{tmp_path}/00042.tar.idx"}


def test_decode_modes():
    colour = Image.fromarray(PICTURE)
    grey = np.asarray(colour.convert("L"))
    clear = colour.copy()
    clear.putalpha(0)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.array_equal(decode(encoded(colour.convert("L"))), np.repeat(grey[..., None], 3, 2))
    assert (decode(encoded(clear)) == 255).all()
    assert (decode(encoded(half)) == 127).all()
    assert decode(encoded(colour.convert("1"))).shape == (64, 64, 3)
    cmyk = decode(encoded(colour.convert("CMYK"), "jpeg", quality=95)).astype(int)
    assert np.abs(cmyk - PICTURE).mean() < 6
    palette = colour.convert("P")
    assert np.array_equal(decode(encoded(palette)), np.asarray(palette.convert("RGB")))
    clear_index = np.asarray(palette) == np.asarray(palette)[0, 0]
    see_through = decode(encoded(palette, transparency=int(np.asarray(palette)[0, 0])))
    assert (see_through[clear_index] == 255).all()
    assert np.array_equal(see_through[~clear_index], np.asarray(palette.convert("RGB"))[~clear_index])
    deep = Image.fromarray(np.full((4, 4), 130 * 256, np.uint16))
    assert (decode(encoded(deep)) == 130).all()


def test_decode_turns_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encoded(PICTURE[:, :48], "png", exif=exif))
    assert np.array_equal(turned, np.rot90(PICTURE[:, :48], -1))


def test_decode_draft():
    large = encoded(Image.fromarray(PICTURE).resize((640, 640)), "jpeg")
    assert decode(large).shape == (640, 640, 3)
    assert decode(large, least=64).shape == (80, 80, 3)


def test_what_is_no_picture():
    jpeg = encoded(PICTURE, "jpeg")
    for content in (b"", b"GIF89a", jpeg[:200], jpeg[: len(jpeg) // 2], jpeg[:-20], b"\x00" * 100):
        broken("broken image", lambda content=content: decode(content))


def test_crops_keep_nine_tenths_and_depend_on_their_key_alone():
    rows, columns = np.mgrid[0:200, 0:200].astype(np.uint8)
    place = np.stack([rows, columns, np.zeros_like(rows)], 2)
    areas = []
    for key in range(300):
        crop = random_resized_crop(place, 100, 0, 0, key)
        assert crop.shape == (100, 100, 3)
        # Pixel centres lie half a step inside, on both sides.
        tall, wide = ((int(crop[..., axis].max()) - int(crop[..., axis].min())) * 100 / 99 / 200 for axis in (0, 1))
        areas.append(tall * wide)
        assert (np.diff(crop[:, 50, 0].astype(int)) >= 0).all()
        assert (np.diff(crop[50, :, 1].astype(int)) >= 0).all()
    assert min(areas) > 0.88
    assert np.std(areas) > 0.01
    assert np.array_equal(random_resized_crop(place, 64, 1, 2, 3), random_resized_crop(place, 64, 1, 2, 3))
    assert not np.array_equal(random_resized_crop(place, 64, 1, 2, 3), random_resized_crop(place, 64, 1, 3, 3))


def test_crops_of_draft_and_of_very_large_pictures_look_the_same():
    """Within a few grey levels of 256 of the crop of the picture decoded whole and filtered in one go."""
    large = Image.fromarray(PICTURE).resize((1300, 1000), Image.Resampling.BICUBIC)
    for suffix in ("jpeg", "png"):
        content = encoded(large, suffix)
        drawn = random_resized_crop(picture(content, least=least_side(64)), 64, 1, 2)
        whole = one_go(decode(content), 64, 1, 2)
        assert np.abs(drawn.astype(int) - whole).mean() < 2


def test_crops_of_the_world_are_what_they_were(world):
    """Pictures of 64 pixels: neither draft mode nor averaging takes part."""
    pairs = ImageTextShards(world / "pairs" / "*.tar")
    for i in range(20):
        content = pairs[i].image_bytes
        drawn = random_resized_crop(picture(content, least=least_side(64)), 64, 1, 2, i)
        assert np.array_equal(drawn, one_go(decode(content), 64, 1, 2, i))


def one_go(image, size, *key):
    """The crop by its definition."""
    draws = Draws("crop", *key)
    tall, wide = (draws.between(9487, 10_000) for _ in range(2))
    top, left = (draws.between(0, 10_000 - side) for side in (tall, wide))
    scales = (image.shape[1], image.shape[0]) * 2
    box = [place * scale / 10_000 for place, scale in zip((left, top, left + wide, top + tall), scales, strict=True)]
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))


def test_resize():
    assert resize(PICTURE, 64) is PICTURE
    assert resize(PICTURE[:, :40], 32).shape == (32, 32, 3)
    assert np.abs(resize(PICTURE, 32).mean() - PICTURE.mean()) < 1


LINES = ['{"text": "one", "lang": "en"}', "", '{"text": "zwei ä"}', '{"text": " "}', "{", '{"no": 1}', "[1]"]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_documents(tmp_path, suffix):
    content = "\n".join(LINES).encode()
    for name in "ab":
        (tmp_path / f"{name}.{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    texts = TextShards(f"{tmp_path}/{{a,b}}.{suffix}")
    assert (len(texts), texts.cut) == (12, [])
    for first, name in ((0, "a"), (6, "b")):
        shard = str(tmp_path / f"{name}.{suffix}")
        assert (texts[first].text, texts[first].lang, texts[first].shard) == ("one", "en", shard)
        assert (texts[first + 1].text, texts[first + 1].lang, texts[first + 1].key) == ("zwei ä", None, "1")
        assert broken("empty text", lambda first=first: texts[first + 2]).key == "2"
        for i in (3, 4, 5):
            assert broken("broken json", lambda i=i, first=first: texts[first + i]).shard == shard
    assert pickle.loads(pickle.dumps(texts))[7].text == "zwei ä"
    with pytest.raises(IndexError, match="0 … 11, got 12"):
        texts[12]


def test_many_gzipped_shards_and_members(tmp_path):
    for shard in range(7):
        (tmp_path / f"{shard}.jsonl.gz").write_bytes(
            b"".join(gzip.compress(json.dumps({"text": f"{shard} {i}"}).encode() + b"\n") for i in range(3))
        )
    texts = TextShards(tmp_path / "*.gz")
    assert [texts[i].text for i in range(20, -1, -1)] == [f"{i // 3} {i % 3}" for i in range(20, -1, -1)]


def long_lines(count, seed=0):
    """Documents of 10 to 3,000 bytes, one of two million."""
    words = np.random.default_rng(seed).integers(0, 5000, (count, 400))
    lengths = np.random.default_rng(seed + 1).integers(1, 400, count)
    texts = [" ".join(map(str, row[:length])) for row, length in zip(words, lengths, strict=True)]
    texts[count // 2] = " ".join(map(str, range(300_000)))
    return texts


def gzipped(texts, **options):
    return gzip.compress("".join(json.dumps({"text": one}) + "\n" for one in texts).encode(), **options)


def test_documents_across_seek_points(tmp_path):
    """In any order, over the borders of chunks and members, without the shard in memory."""
    texts = [*long_lines(900), *long_lines(900, seed=7)]
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzipped(texts[:900]) + bytes(1000) + gzipped(texts[900:]))
    found = TextShards(path)
    assert (len(found), found.cut) == (1800, [])
    points = found._indices[0].array("points")
    assert len(points) > 8
    for i in (*np.random.default_rng(0).permutation(1800)[:150].tolist(), *range(440, 460), 899, 900, 1799, 0):
        assert found[i].text == texts[i], i
    assert len(found._held) <= 8
    assert max(len(content) for _, content in found._held.values()) < 3 * seek_points.SPACING
    assert pickle.loads(pickle.dumps(found))[1000].text == texts[1000]


def test_a_gzipped_shard_that_changes_or_goes(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzipped(long_lines(300)))
    found = TextShards(path)
    path.write_bytes(gzipped(long_lines(100)))
    with pytest.raises(OSError, match=r"a.json.gz cannot be read from byte \d+ on"):
        found[299]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        found[0]


def test_gzipped_documents_cut_short(tmp_path):
    lines = [json.dumps({"text": f"{i} {hashlib.sha256(bytes([i])).hexdigest()}"}) for i in range(100)]
    whole = gzip.compress("\n".join(lines).encode())
    path = tmp_path / "a.jsonl.gz"
    for length in (0, 5, 12, 300, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:length])
        texts = TextShards(path)
        assert texts.cut == ([str(path)] if length else [])
        assert len(texts) <= 100
        assert [texts[i].text for i in range(len(texts))] == [json.loads(line)["text"] for line in lines[: len(texts)]]
    assert len(texts) == 99, "the last line may not be whole"


@pytest.mark.parametrize("fault", ["cut", "damaged"])
def test_a_large_gzipped_shard_up_to_its_fault(tmp_path, fault):
    texts = long_lines(3000)
    whole = bytearray(gzipped(texts))
    middle = len(whole) * 3 // 4
    if fault == "cut":
        del whole[middle:]
    else:
        whole[middle : middle + 2000] = bytes(2000)
    path = tmp_path / "a.json.gz"
    path.write_bytes(whole)
    found = TextShards(path)
    assert found.cut == [str(path)]
    assert len(found) > 1600
    right = [i for i in range(len(found)) if reads(found, i, texts[i])]
    # Damaged data may still mean something for a while.
    assert right == list(range(len(right)))
    assert len(found) - len(right) < (1 if fault == "cut" else 400)


def reads(found, i, text):
    try:
        return found[i].text == text
    except BrokenSample:
        return False


def test_parquet(tmp_path):
    texts = ["one", "zwei", None, " ", *map(str, range(20))]
    langs = ["en", "de", *["en"] * 22]
    pq.write_table(pa.table({"id": range(24), "text": texts, "lang": langs}), tmp_path / "a.parquet", row_group_size=5)
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet", row_group_size=7)
    found = TextShards(f"{tmp_path}/*.parquet")
    assert (len(found), found.cut) == (48, [])
    for i in (23, 4, 10, 0, 9):
        assert (found[i].text, found[i].lang, found[i].key) == (texts[i], langs[i], str(i))
        assert (found[24 + i].text, found[24 + i].lang) == (texts[i], None)
    for i in (2, 3, 26):
        assert broken("empty text", lambda i=i: found[i]).shard.endswith("a.parquet" if i < 24 else "b.parquet")
    assert pickle.loads(pickle.dumps(found))[1].text == "zwei"
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"documents: .*c.parquet has no footer, so nothing in it can be read"):
        TextShards(tmp_path / "c.parquet")
    pq.write_table(pa.table({"content": texts}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"documents: .*d.parquet must have a column text, got content"):
        TextShards(tmp_path / "d.parquet")


def test_documents_are_scanned_once(tmp_path, monkeypatch):
    scanned = scans(monkeypatch, text)
    (tmp_path / "a.jsonl").write_text("\n".join(LINES))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(LINES).encode()))
    for _ in range(2):
        assert len(TextShards(f"{tmp_path}/{{a.jsonl,b.jsonl.gz}}", index=str(tmp_path / "index"))) == 12
    assert len(scanned) == 2
