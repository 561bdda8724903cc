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
import pytest
import webdataset
from PIL import Image

from simvlm.data.scenes import render, sample_scene
from simvlm.data.shards import BrokenSample, ImageTextShards, decode, expand
from simvlm.data.text import TextShards
from simvlm.data.transforms import random_resized_crop, resize
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


def test_the_index_is_kept_beside_the_shard_and_follows_it(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("0.png", b"x"), ("0.txt", b"one")])
    assert ImageTextShards(path)[0].text == "one"
    beside = tmp_path / "s.tar.idx.json"
    kept = json.loads(beside.read_text())
    beside.write_text(json.dumps(kept | {"keys": ["kept"]}))
    assert ImageTextShards(path)[0].key == "kept"
    for stale in (json.dumps(kept | {"version": 0, "keys": ["old"]}), "{", "[]"):
        beside.write_text(stale)
        assert ImageTextShards(path)[0].key == "0"
    write_tar(path, [("0.png", b"x"), ("0.txt", b"one"), ("1.png", b"y"), ("1.txt", b"two")])
    assert len(ImageTextShards(path)) == 2
    assert sorted(os.listdir(tmp_path)) == ["s.tar", "s.tar.idx.json"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", [("0.png", b"x"), ("0.txt", b"one")])

    def refuse(*arguments, **options):
        raise PermissionError("read-only")

    # A mode of 0o555 would not stop root.
    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert ImageTextShards(path)[0].text == "one"
    assert os.listdir(tmp_path) == ["s.tar"]


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
    for content in (b"", b"GIF89a", encoded(PICTURE, "jpeg")[:200], b"\x00" * 100):
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


def test_gzipped_documents_cut_short(tmp_path):
    lines = [json.dumps({"text": f"{i} {hashlib.sha256(bytes([i])).hexdigest()}"}) for i in range(100)]
    whole = gzip.compress("\n".join(lines).encode())
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    texts = TextShards(path)
    assert texts.cut == [str(path)]
    assert 30 < len(texts) < 70
    for i in range(len(texts)):
        assert texts[i].text == json.loads(lines[i])["text"]
