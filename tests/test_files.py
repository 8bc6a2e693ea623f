"""What lies in a checkpoint directory, whoever put it there: one error that names the file, or what the files mean."""

import json
import os
import random
import shutil
import socket
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxkv
from jaxkv import safetensors
from jaxkv.models.files import INDEX, SINGLE, Files, config_path, read_json

GOLDEN = Path(__file__).parent / "golden" / "families"


@pytest.fixture
def folder(tmp_path):
    """A writable copy of a small checkpoint, in one file."""
    return Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "llama3"))


@pytest.fixture
def sharded(tmp_path):
    """One in six files."""
    return Path(shutil.copytree(GOLDEN / "mistral", tmp_path / "mistral"))


def put_in_place(path, kind):
    """Puts something that is not a file where a file is expected."""
    path.unlink(missing_ok=True)
    if kind == "a directory":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as it:
            here = os.getcwd()
            os.chdir(path.parent)  # the path of a socket is short
            it.bind(path.name)
            os.chdir(here)


@pytest.mark.parametrize("kind", ["a directory", "a named pipe", "a device", "a socket"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", SINGLE, INDEX, "model-00001-of-00006.safetensors"]
)
def test_what_is_not_a_file_is_not_opened(sharded, name, kind):
    put_in_place(sharded / name, kind)
    with pytest.raises(ValueError, match=rf"{name} is {kind}, not a file; put the file there"):
        jaxkv.models.load(sharded)


def test_links_lead_to_files_as_in_the_cache_of_the_hub(sharded, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(i)))
    assert len(Files(snapshot)) == len(Files(GOLDEN / "mistral"))
    with pytest.raises(FileNotFoundError, match=rf"a folder of the hub's cache; the checkpoint lies in {snapshot}"):
        jaxkv.models.load(tmp_path)
    (snapshot / SINGLE).symlink_to("../../blobs/gone")
    with pytest.raises(FileNotFoundError, match=r"leads to \.\./\.\./blobs/gone, which is not there; fetch the file"):
        Files(snapshot)


def test_where_a_checkpoint_is_not_the_cure_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for given, message in {
        "org/some-model": r"hf download org/some-model --local-dir some-model; then give some-model instead",
        "nowhere": r"nowhere is not a directory; give one that holds a checkpoint: config\.json",
        "llama3/config.json": r"config\.json is a file; give the directory that holds it",
        ".": r"\. has no config\.json; give one of the directories in it",
        "": r"\. has no config\.json; give one of the directories in it",
        "empty": r"empty has no config\.json; give a directory as Hugging Face publishes them",
        "a\0b": "is not a directory",
    }.items():
        for ask in (jaxkv.models.load, config_path):
            with pytest.raises(FileNotFoundError, match=message):
                ask(given)
    assert config_path("llama3") == Path("llama3/config.json")
    assert jaxkv.models.read_config("llama3/config.json")[0] == jaxkv.models.read_config("llama3")[0] == "llama"
    with pytest.raises(FileNotFoundError, match="hf download org/some-model"):
        jaxkv.models.read_config("org/some-model")


def test_what_a_folder_holds_in_place_of_a_checkpoint_is_named(folder, tmp_path):
    """Adapters, other formats, half a download, the parent of checkpoints, a clone without its large files."""

    def fails(given: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            jaxkv.models.load(given)

    fails(tmp_path, FileNotFoundError, r"has no config\.json; give one of the directories in it .*: llama3$")
    config = (folder / "config.json").read_text()
    adapter = '{"peft_type": "LORA", "base_model_name_or_path": "org/base"}'
    for names, message in {
        ("model-Q4_K_M.gguf",): r"model-Q4_K_M\.gguf can't be read: .*model\.save_pretrained\(DIR\)",
        ("a.bin", "b.pth"): r"a\.bin, b\.pth can't be read",
        ("adapter_config.json", "adapter_model.bin"): r"it holds an adapter of 'org/base', .*merge_and_unload",
        ("a.safetensors", "model.safetensors.incomplete"): r"neither .*, only a\.safetensors, model.*incomplete; fetch",
    }.items():
        other = tmp_path / names[0] / "folder"
        other.mkdir(parents=True)
        for name in names:
            (other / name).write_text(adapter)
        if "safetensors" not in names[0]:
            fails(other, FileNotFoundError, rf"has no config\.json; .*{message}")
        (other / "config.json").write_text(config)
        fails(other, FileNotFoundError, message)
    fails(
        tmp_path / "model-Q4_K_M.gguf" / "folder" / "model-Q4_K_M.gguf", FileNotFoundError, r"is a \.gguf file, which"
    )
    (folder / "adapter_config.json").write_text(adapter)
    assert "the adapter that lies here is not applied" in jaxkv.models.load(folder).notes[0]
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
        fails(folder, ValueError, rf"{name} is a pointer of Git LFS, not the file itself; fetch that: git lfs pull")


NOT_JSON = {
    "cut": (b'{"a": 1', "is not valid JSON: Expecting"),
    "nested": (b'{"a":' * 100_000, "is not valid JSON: .*recursion"),
    "not UTF-8": (b'{"a": "\xff"}', "is not text in UTF-8: .*byte 0xff"),
    "too large a float": (b'{"a": 1e999}', "is not valid JSON: '1e999' is larger than any float"),
    "too long an int": (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
    "two values": (b'{"b": {"a": 1, "a": true}}', "is not valid JSON: 'a' has two values, 1 and True; keep one"),
    "a list": (b"[]", "holds a list, must be an object"),
    "empty": (b"", "is not valid JSON: Expecting value"),
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize("case", NOT_JSON)
def test_json_that_is_none_is_refused_in_every_file(sharded, name, case):
    content, message = NOT_JSON[case]
    (sharded / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        jaxkv.models.load(sharded)


def test_json_larger_than_the_file_can_mean_is_not_read(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(ValueError, match=r"config\.json has 1,099,511,627,776 bytes, and such a file has at most"):
        jaxkv.models.load(folder)


def test_json_as_people_write_it_is_read(tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1, "b": {"c": [2]}, "a": 1, "b": {"c": [2]}}')
    assert read_json(path) == {"a": 1, "b": {"c": [2]}}
    assert read_json(tmp_path / "not there.json", needed=False) == {}


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "sub/../../other.safetensors",
        "/etc/passwd",
        "config.json",
        "a\0.safetensors",
        "",
        3,
        None,
        [],
    ],
    ids=repr,
)
def test_an_index_names_files_in_its_directory_alone(sharded, name):
    shutil.copy(sharded / "model-00001-of-00006.safetensors", sharded.parent / "other.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=rf'{INDEX}: "weight_map" names the file .* must be a \.safetensors file in its'
    ):
        Files(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors", 3])
def test_a_weight_map_of_another_kind_is_refused(sharded, weight_map):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        ValueError, match=rf'{INDEX}: "weight_map" is .* must be an object of names of tensors and files'
    ):
        Files(sharded)


def test_shards_that_are_missing_are_named_and_what_has_another_format_too(sharded):
    for path in sharded.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"names 6 files, .* not there: model-00001-of-00006\.safetensors, .* 3 more;"
    ):
        Files(sharded)
    (sharded / INDEX).unlink()
    (sharded / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .*pytorch_model\.bin can't be read"):
        Files(sharded)


def test_a_tensor_in_two_shards_is_the_same_or_refused(sharded):
    tensors = dict(Files(sharded))
    path = sharded / "model-00006-of-00006.safetensors"
    last = dict(safetensors.File(path))
    name = next(name for name in tensors if name not in last)
    safetensors.write(path, {**last, name: tensors[name]})
    assert set(Files(sharded)) == set(tensors)
    safetensors.write(path, {**last, name: tensors[name] + tensors[name].dtype.type(1)})
    with pytest.raises(
        ValueError, match=rf"model-0000\d-of-00006\.safetensors and {path.name} both hold .{name}., with"
    ):
        Files(sharded)


def test_an_old_index_beside_a_whole_file_is_not_read(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    model = jaxkv.models.load(folder)
    assert model.notes == (f"{INDEX} is not read: {SINGLE} lies beside it",)
    safetensors.write(folder / SINGLE, {k: v for k, v in Files(folder).items() if k != "model.norm.weight"})
    with pytest.raises(
        ValueError, match=r"does not fit its config\.json \(model\.safetensors\.index\.json is not read"
    ):
        jaxkv.models.load(folder)


def test_saved_in_several_files_an_old_whole_one_goes(folder):
    model = jaxkv.models.load(folder)
    jaxkv.models.save(folder, model, max_shard_bytes=10_000)
    assert not (folder / SINGLE).exists() and not Files(folder).notes
    again = jaxkv.models.load(folder)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_a_model_is_not_saved_onto_a_file(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match="this is not a directory; give the name of one to save into"):
        jaxkv.models.save(tmp_path / "model", jaxkv.models.tiny.load())
    assert (tmp_path / "model").read_text() == "mine"


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Returns what a bad disk, a stopped download or a bad person makes of a file."""
    at, other = rng.randrange(len(content)), rng.randrange(len(content))
    match rng.randrange(7):
        case 0:
            return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        case 1:
            return content[:at]
        case 2:
            return content[: min(at, other)] + content[max(at, other) :]
        case 3:
            return content[:at] + rng.randbytes(8) + content[at + 8 :]
        case 4:
            odd = [b"-1", b"1e999", b"NaN", b"null", b'"x"', b"[]", b"{}", b"true", b"9" * 30, b"2147483648", b"0"]
            numbers = [i for i in range(min(len(content), 5000)) if content[i : i + 1].isdigit()] or [at]
            begin = rng.choice(numbers)
            end = begin + 1
            while content[end : end + 1].isdigit():
                end += 1
            return content[:begin] + rng.choice(odd) + content[end:]
        case 5:
            return rng.choice([b"\xff" * 8, b"\0" * 8, (1 << 40).to_bytes(8, "little")]) + content[8:]
        case _:
            return content[:at] + content[other : other + 20] + content[at:]


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX, "shard"])
def test_damaged_files_are_loaded_or_refused_with_one_error_whatever_the_damage(name, folder, sharded):
    where = folder if name == SINGLE else sharded
    path = where / ("model-00002-of-00006.safetensors" if name == "shard" else name)
    whole, rng, refused = path.read_bytes(), random.Random(name), 0
    header = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else len(whole)
    for _ in range(40 if name == INDEX else 150):  # most of an index may be anything, and the rest is loaded
        content = damaged(whole[:header], rng) + whole[header:]
        path.write_bytes(content)
        try:
            jaxkv.models.load(where)
        except jaxkv.NotSupportedError:
            refused += 1
        except (ValueError, FileNotFoundError) as error:
            if type(error) not in (ValueError, FileNotFoundError) or str(where) not in str(error):
                raise
            refused += 1
    assert refused > 15
