"""Named arrays in files."""

import json
import os
import re
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import aligned, safetensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [*safetensors.DTYPES.values()])
def test_every_dtype_layout_and_shape_comes_back(path, dtype):
    square = np.arange(1, 13).reshape(3, 4).astype(jnp.dtype(dtype))
    tensors = {
        "square": square,
        "transposed": square.T,
        "strided": square[::2, 1:],
        "scalar": square[1, 1],
        "empty": square[:0],
        "an odd number of bytes": np.ones(3, np.int8),
    }
    safetensors.write(path, tensors, metadata={"made by": "a test"})
    file = safetensors.File(path)
    assert file.metadata == {"made by": "a test"}
    assert set(file) == set(tensors)
    for name, tensor in tensors.items():
        assert file[name].dtype == tensor.dtype
        np.testing.assert_array_equal(file[name], tensor)


def test_arrays_of_whole_cache_lines_lie_where_xla_reads_them_in_place(path):
    tensors = {"a": np.ones(3, np.float32), "b": np.ones((2, 64), np.uint8), "c": np.ones(16, np.float32)}
    safetensors.write(path, tensors, metadata={"a text": "of some length"})
    file = safetensors.File(path)
    assert [aligned.is_aligned(file[name]) for name in ("b", "c")] == [True, True]
    assert file.offset("a") > max(file.offset("b"), file.offset("c"))


def test_the_safetensors_package_reads_what_is_written_and_writes_what_is_read(path):
    package = pytest.importorskip("safetensors.numpy")
    tensors = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a": np.arange(4, dtype=np.int32),
        "c": np.ones((1,), bool),
    }
    safetensors.write(path, tensors, metadata={"format": "np"})
    for name, tensor in package.load_file(path).items():
        np.testing.assert_array_equal(tensor, tensors[name])
    package.save_file(tensors, path)
    for name, tensor in safetensors.File(path).items():
        np.testing.assert_array_equal(tensor, tensors[name])


def test_files_of_the_safetensors_package_with_narrow_or_complex_dtypes_are_read_and_the_other_way_round(path):
    package = pytest.importorskip("safetensors.numpy")
    names = {code: name for code, name in safetensors.DTYPES.items() if code[:2] in ("F8", "C6")}
    assert len(names) == 6
    arrays = {code: np.array([1, 2, 4]).astype(kind) for code, kind in names.items()}
    package.save_file(arrays, path)
    for code, x in safetensors.File(path).items():
        assert x.dtype == arrays[code].dtype and x.astype(complex).tolist() == [1, 2, 4]
    safetensors.write(path, arrays)
    theirs = dict(package.deserialize(path.read_bytes()))
    assert {code: (x["dtype"], bytes(x["data"])) for code, x in theirs.items()} == {
        code: (code, x.tobytes()) for code, x in arrays.items()
    }


@pytest.mark.parametrize("kept", [0, 7, 30, -1])
def test_a_file_that_is_cut_short_is_refused(path, kept):
    safetensors.write(path, {"w": np.ones(50, np.float32)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut short"):
        safetensors.File(path)


@pytest.mark.parametrize("size", [8, 1 << 20, 39 << 30])
@pytest.mark.parametrize("length", [100_000_001, 39 << 30, 1 << 63, (1 << 64) - 1])
def test_a_header_that_no_file_has_is_not_read(path, size, length):
    path.write_bytes(length.to_bytes(8, "little"))
    with path.open("r+b") as file:
        file.truncate(size)  # takes no room on the disk
    with pytest.raises(ValueError, match=rf"is not a safetensors file, or cut short: .* header has {length:,} bytes"):
        safetensors.File(path)


def test_what_is_not_a_file_is_not_opened(path):
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"model\.safetensors is a device, not a file"):
        safetensors.File(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"model\.safetensors is a named pipe, not a file"):
        safetensors.File(path)
    with pytest.raises(ValueError, match="is a directory, not a file"):
        safetensors.File(path.parent)


def with_header(path, header, size=8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


def of(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b"[" * 100_000,
        b"\xff{}",
        [],
        {"w": 3},
        {"w": {"dtype": "F32"}},
        {"w": of([1], 0, 8) | {"data_offsets": [0]}},
        {"w": of([2], 0, 8, ["F32"])},
        {"w": of([2], 0, float("inf"))},
        {"w": of([-1, -2], 0, 8)},
        {"w": of([2, 0], 0, 8)},
        {"w": of([0, 2**70], 0, 0), "x": of([2], 0, 8)},
        {"w": of([2**300], 0, 8)},
        {"w": of([2**32, 2**32], 0, 0), "x": of([2], 0, 8)},
        {"w": of([2**62, 4], 0, 0), "x": of([2], 0, 8)},
        {"w": of([2], -8, 0)},
        {"w": of([2], 0, 2**64 + 8)},
        {"w": of([2], 0, 8, "F4"), "x": of([1], 8, 4, "F4")},
        b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}',
        {"w": of([1] * 99 + [2], 0, 8)},
        {"w": of("2", 0, 8)},
        {"w": of([2.0], 0, 8)},
        {"w": of([2, True], 0, 8)},
        {"w": of([2], 0, 8), "__metadata__": []},
        {"w": of([2], 0, 8), "__metadata__": {"step": 3}},
        {"w": of([2], 0, 8), "x": of([2], 0, 8)},
        {"w": of([1], 0, 4), "x": of([1], 0, 4), "y": of([1], 4, 8)},
        {"w": of([1], 4, 8)},
        {"w": of([1], 0, 4)},
        {"w": of([2], 0, 8), "x": of([1], 0, 4)},
        {"w": of([3], 0, 12)},
        {"w": of([2], 8, 0)},
        {},
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "w": {"dtype": "I32", "shape": [2], '
        b'"data_offsets": [0, 8]}}',
    ],
    ids=lambda header: str(header)[:60],
)
def test_a_header_that_is_damaged_is_refused(path, header):
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file, or damaged or cut short, "):
        safetensors.File(with_header(path, header))


def test_what_the_format_allows_is_read(path):
    header = {"b": of([], 4, 8), "a": of([0, 3], 0, 0), "c": of([1, 1], 0, 4), "__metadata__": None}
    file = safetensors.File(with_header(path, header))
    assert {name: x.shape for name, x in file.items()} == {"b": (), "a": (0, 3), "c": (1, 1)} and file.metadata == {}
    assert dict(safetensors.File(with_header(path, b"{}   ", 0))) == {}


def test_an_unknown_dtype_is_named_when_it_is_asked_for(path):
    file = safetensors.File(with_header(path, {"w": of([2], 0, 1, "F4"), "ok": of([1], 1, 5)}, 5))
    assert file["ok"].tolist() == [0] and file.shape("w") == (2,) and "w" in file
    assert file.is_known("ok") and not file.is_known("w")
    for ask in (file.kind, file.__getitem__):
        with pytest.raises(ValueError, match=r"model\.safetensors: w has dtype F4; known are F64, F32"):
            ask("w")
    with pytest.raises(ValueError, match="w is complex128; safetensors knows float64"):
        safetensors.write(path, {"w": np.ones(2, np.complex128)})


def test_big_endian_arrays_are_written_as_the_format_says(path):
    tensors = {kind: np.arange(3).astype(kind) for kind in (">f4", ">f2", ">i8", ">u2", ">c8", "<f8")}
    safetensors.write(path, tensors)
    for name, x in safetensors.File(path).items():
        assert x.tolist() == [0, 1, 2] and x.dtype == np.dtype(name).newbyteorder("<")


def test_several_may_save_to_one_path_and_nobodys_file_is_touched(path):
    class Slow:
        """Hands its data over when another one is being written as well."""

        dtype, shape = np.dtype("float32"), (1000,)

        def __init__(self, value):
            self.value = value

        def __array__(self, dtype=None, copy=None):
            both.wait(10)
            return np.full(1000, self.value, np.float32)

    mine = path.with_name(f"{path.name}.partial")
    mine.write_text("mine")
    both = threading.Barrier(2)
    threads = [threading.Thread(target=safetensors.write, args=(path, {"w": Slow(i)})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(safetensors.File(path)["w"].tolist())) == 1
    assert sorted(path.parent.iterdir()) == [path, mine] and mine.read_text() == "mine"


def test_links_are_followed_and_the_home_directory_is_known(path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    link = path.with_name("latest.safetensors")
    link.symlink_to(path.name)
    safetensors.write("~/latest.safetensors", {"w": np.ones(2)})
    assert link.is_symlink() and not path.is_symlink()
    assert safetensors.File(path)["w"].tolist() == safetensors.File("~/latest.safetensors")["w"].tolist() == [1, 1]


def test_the_name_that_the_format_has_for_itself_is_refused(path):
    with pytest.raises(ValueError, match="safetensors has the name __metadata__ for itself; give that array another"):
        safetensors.write(path, {"__metadata__": np.ones(1), "w": np.ones(1)})
    assert not path.exists()


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 70_000), ("bfloat16", 3.4e38), ("float8_e4m3fn", -1000), ("float8_e8m0fnu", 0)]
)
def test_a_cast_that_would_lose_a_number_is_refused_and_the_old_file_stays(path, dtype, value):
    safetensors.write(path, {"w": np.ones(1)})
    with pytest.raises(
        ValueError, match=rf"w has {re.escape(str(value))}\S*, which {dtype} can't hold; give a wider dtype, or clip it"
    ):
        safetensors.write(path, {"w": np.array([1, np.inf, np.nan, value], np.float32)}, dtype=dtype)
    assert safetensors.File(path)["w"].tolist() == [1] and list(path.parent.iterdir()) == [path]
    safetensors.write(path, {"w": np.array([1.0001, np.inf, np.nan], np.float32), "n": np.array([70_000])}, dtype=dtype)
    assert safetensors.File(path)["w"].astype(float)[0] == 1 and safetensors.File(path)["n"].tolist() == [70_000]


def test_a_failed_write_leaves_the_old_file(path):
    class Broken:
        dtype, shape = np.dtype("float32"), (2,)

        def __array__(self, *args, **kwargs):
            raise OSError("gone")

    safetensors.write(path, {"w": np.ones(2)})
    with pytest.raises(OSError, match="gone"):
        safetensors.write(path, {"w": Broken()})
    assert safetensors.File(path)["w"].tolist() == [1.0, 1.0]
    assert list(path.parent.iterdir()) == [path]


def test_metadata_that_is_no_text_is_refused_before_anything_is_written(path):
    for metadata, text in [
        ({"step": 3}, r"'step': 3 has a int, .* give str\(3\)"),
        ({3: "step"}, r"3: 'step' has a int, .* give str\(3\)"),
        ({"a": None}, "has a NoneType"),
        ([("a", "b")], r"metadata=\[\('a', 'b'\)\]: give strings by name"),
        ("text", "give strings by name"),
    ]:
        with pytest.raises(ValueError, match=text):
            safetensors.write(path, {"w": np.ones(2)}, metadata=metadata)
    assert not list(path.parent.iterdir())
    safetensors.write(path, {"w": np.ones(2)}, metadata={})
    assert safetensors.File(path).metadata == {}


def test_floating_arrays_are_cast_to_floating_dtypes_alone(path):
    for dtype in ("int8", "bool", "bf16", "float4_e2m1fn", "complex64", 3):
        with pytest.raises(ValueError, match=f"dtype={dtype!r}: .* float32, float16, bfloat16, float8_e4m3fn, .*None"):
            safetensors.write(path, {"w": np.ones(2)}, dtype=dtype)
    assert not list(path.parent.iterdir())
    for dtype in ("float16", jnp.bfloat16, np.float32, np.dtype("float64"), jnp.float8_e5m2):
        safetensors.write(path, {"w": np.ones(2), "n": np.arange(2)}, dtype=dtype)
        file = safetensors.File(path)
        assert (file.kind("w"), file.kind("n")) == (jnp.dtype(dtype), np.dtype("int64"))


def test_a_folder_that_is_not_there_or_is_given_as_the_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=r"no such folder to save into; make it first: '.*gone'"):
        safetensors.write(path.parent / "gone" / "w.safetensors", {"w": np.ones(2)})
    with pytest.raises(IsADirectoryError, match=f"this is a folder; give the name of a file: '{path.parent}'"):
        safetensors.write(path.parent, {"w": np.ones(2)})


def test_checksums_notice_any_byte_that_changed(path):
    tensors = {"a": np.arange(9000, dtype=np.float32), "b": np.arange(5, dtype=np.uint8), "none": np.zeros((0, 3))}
    safetensors.write(path, tensors, metadata={"said": "0" * 40}, checked=True)
    file = safetensors.File(path)
    assert file.metadata == {"said": "0" * 40}
    file.check(file)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for at in [*range(header), *range(header, len(content), 997), *range(len(content) - 6, len(content))]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            (file := safetensors.File(path)).check(file)
    swapped = bytearray(content)  # blocks of a disk in another order
    swapped[-5 - 36000 : -5 - 36000 + 16384], swapped[-5 - 36000 + 16384 : -5 - 36000 + 32768] = (
        content[-5 - 36000 + 16384 : -5 - 36000 + 32768],
        content[-5 - 36000 : -5 - 36000 + 16384],
    )
    path.write_bytes(swapped)
    with pytest.raises(ValueError, match="the numbers of a are not those"):
        safetensors.File(path).check(["a"])
    safetensors.write(path, tensors)
    with pytest.raises(ValueError, match="has no checksums"):
        safetensors.File(path).check()
