import struct
import time

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from spiel_jax.errors import SpielError
from spiel_jax.models.io.gguf_header import TensorInfo, is_gguf, read_header
from spiel_jax.models.io.loading import open_model

HUGE = 2**60


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def tensor(name="w", shape=(4,), kind=0, offset=0):
    axes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + axes + struct.pack("<IQ", kind, offset)


def file_of(keys=(), tensors=(), *, version=3, counts=None, data=b"", magic=b"GGUF"):
    counts = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


@pytest.fixture
def read(tmp_path):
    def run(content):
        (tmp_path / "x.gguf").write_bytes(content)
        return read_header(tmp_path / "x.gguf")

    return run


def test_equals_the_reader_of_llama_cpp(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    for name, value in {"u8": 255, "i8": -1, "u16": 65535, "i16": -2, "u32": 2**32 - 1, "i32": -3}.items():
        kinds = {
            "u8": "uint8",
            "i8": "int8",
            "u16": "uint16",
            "i16": "int16",
            "u32": "uint32",
            "i32": "int32",
        }
        getattr(writer, f"add_{kinds[name]}")(name, value)
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_bool("yes", True)
    writer.add_string("text", "é 漢字")
    writer.add_array("strings", ["a", "", "é"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("floats", [0.5, 0.1])
    writer.add_array("flags", [True, False])
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    for kind in (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0):
        writer.add_tensor(kind.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("vector", values[0, :5].copy())
    writer.add_tensor("deep", np.ones((2, 3, 4, 5), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader, header = gguf.GGUFReader(path), read_header(path)
    theirs = {name: field.contents() for name, field in reader.fields.items() if name[:5] != "GGUF."}
    assert header.fields == theirs
    assert {k: type(v) for k, v in header.fields.items()} == {k: type(v) for k, v in theirs.items()}
    assert header.tensors == {
        t.name: TensorInfo(t.tensor_type, tuple(int(n) for n in t.shape[::-1]), t.data_offset)
        for t in reader.tensors
    }
    whole = path.read_bytes()
    for t in reader.tensors:
        info = header.tensors[t.name]
        stored = whole[info.start : info.start + int(np.prod(info.byte_shape))]
        assert stored == t.data.tobytes()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is not a GGUF file: it begins with b''"),
        (file_of(magic=b"GGML"), "is not a GGUF file: it begins with b'GGML'"),
        (file_of(version=1), "GGUF version 1: expected one of 2, 3"),
        (file_of(version=4), "GGUF version 4"),
        (file_of(version=0x03000000), "is big-endian"),
        (b"GGUF", "the version does not fit"),
        (file_of(counts=(0, HUGE)), f"its {HUGE} keys does not fit"),
        (file_of(counts=(2**64 - 1, 0)), "tensors does not fit"),
        (file_of([struct.pack("<Q", HUGE) + b"x" * 20]), "the name of a key does not fit"),
        (file_of([key("a", 8, struct.pack("<Q", HUGE))]), "the key 'a' does not fit"),
        (
            file_of([key("a", 9, struct.pack("<IQ", 0, HUGE))]),
            f"the key 'a' .an array of {HUGE}. does not fit",
        ),
        (
            file_of([key("a", 9, struct.pack("<IQ", 8, HUGE))]),
            f"the key 'a' .an array of {HUGE}. does not fit",
        ),
        (file_of([key("a", 9, struct.pack("<IQ", 12, 2**61))]), "the key 'a' .* does not fit"),
        (
            file_of([key("a", 9, struct.pack("<IQ", 9, 1) * 1000)]),
            "the key 'a' .* entries of type 9, which is not",
        ),
        (file_of([key("a", 13, bytes(8))]), "the key 'a' has type 13, which is unknown"),
        (file_of([key("a", 8, text(b"\xff"))]), "the key 'a' at byte .* is not UTF-8"),
        (file_of([key(b"\xff", 0, b"1")]), "the name of a key at byte .* is not UTF-8"),
        (file_of([key("a", 0, b"1"), key("a", 0, b"2")]), "the key 'a' is there twice"),
        (file_of([key("general.alignment", 4, struct.pack("<I", 0))]), "must be a power of two, got 0"),
        (file_of([key("general.alignment", 4, struct.pack("<I", 24))]), "must be a power of two, got 24"),
        (file_of([key("general.alignment", 8, text("32"))]), "must be a power of two, got '32'"),
        (file_of([], [tensor(shape=())]), "the tensor 'w' has 0 axes"),
        (file_of([], [tensor(shape=(1,) * 5)]), "the tensor 'w' has 5 axes"),
        (
            file_of([], [tensor(shape=(0, 4))]),
            r"the tensor 'w' has shape \[4, 0\], which cannot be stored as F32",
        ),
        (file_of([], [tensor(shape=(33,), kind=8)]), r"shape \[33\], which cannot be stored as Q8_0"),
        (file_of([], [tensor(shape=(2**40, 2**40))]), "the tensor 'w' of .* bytes does not fit"),
        (file_of([], [tensor(shape=(2**63, 2))]), "the tensor 'w' of .* bytes does not fit"),
        (file_of([], [tensor(kind=99)]), "the tensor 'w' is stored as type 99, which is unknown"),
        (file_of([], [tensor(offset=32)], data=bytes(64)), "the tensor 'w' begins at 32 .* expected 0"),
        (file_of([], [tensor(), tensor("v")], data=bytes(64)), "the tensor 'v' begins at 0 .* expected 32"),
        (file_of([], [tensor(), tensor(offset=32)], data=bytes(64)), "the tensor 'w' is there twice"),
        (file_of([], [tensor()], data=bytes(15)), "the tensor 'w', which ends at byte .* does not fit"),
    ],
)
def test_lies(read, content, match, tmp_path):
    start = time.monotonic()
    with pytest.raises(SpielError, match=match) as error:
        read(content)
    assert str(tmp_path / "x.gguf") in str(error.value)
    assert time.monotonic() - start < 5
    with pytest.raises(SpielError):
        open_model(str(tmp_path / "x.gguf"))


def test_what_is_whole_is_read(read):
    header = read(file_of([key("a", 0, b"\x07")], [tensor()], data=bytes(16)))
    assert header.fields == {"a": 7}
    assert header.tensors == {"w": TensorInfo(Kind.F32, (4,), 96)}


def test_a_name_does_not_make_a_gguf(tmp_path):
    (tmp_path / "blob").write_bytes(b"GGUF" + bytes(20))
    assert is_gguf(tmp_path / "blob")
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "absent")
