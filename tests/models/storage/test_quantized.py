"""NF4, FP4 and int8 against bitsandbytes and against the plain computation, bit for bit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import bitsandbytes_numpy as slow
from support.programs import AS_USERS, run_as_users

from spiel_jax.models import ModelConfig, abstract_params
from spiel_jax.models.decoder import ADAPTED
from spiel_jax.models.storage import FP4, NF4, Int8
from spiel_jax.models.storage.codebooks import DYNAMIC, nearest_dynamic
from spiel_jax.models.storage.rounding import rounded, sealed
from spiel_jax.models.storage.weight import nbytes
from spiel_jax.ops.matmul import linear

torch = pytest.importorskip("torch")
FOUR_BIT = {"nf4": NF4, "fp4": FP4}
DTYPES = ("float32", "bfloat16", "float16")


def mostly_slow(few, *axes):
    """All combinations as parameters, slow but for a few."""
    marked = {False: pytest.mark.slow, True: ()}
    return [pytest.param(*case, marks=marked[case in few]) for case in itertools.product(*axes)]


SHAPES = ((10, 128), (37, 512), (7, 90))  # blocks run on over rows of 90


def as_users(function, *arguments):
    return jax.jit(function).lower(*arguments).compile(AS_USERS)(*arguments)


@pytest.fixture(scope="module")
def bnb():
    """bitsandbytes, whose generic kernels are on the CPU the exact ones."""
    return pytest.importorskip("bitsandbytes").functional


def weights(rows, columns, dtype, seed=0):
    """With a row of zeros, a block of zeros, and a block of equal entries."""
    array = np.random.default_rng(seed).normal(scale=0.02, size=(rows, columns)).astype(np.float32)
    array[1] = 0
    array[0, :64] = 0
    array[2, :64] = -0.25
    return array.astype(slow.DTYPES[dtype])


def as_torch(array):
    return torch.tensor(np.asarray(array, np.float32)).to(getattr(torch, str(array.dtype)))


def same(found, expected):
    """Equal bits; torch's tensors are compared as float32, which holds all of them."""
    if isinstance(expected, torch.Tensor):
        expected = (expected.float() if expected.is_floating_point() else expected).numpy()
        found = np.asarray(found, expected.dtype)
    np.testing.assert_array_equal(np.asarray(found).reshape(-1), np.asarray(expected).reshape(-1))


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    mostly_slow(
        [("nf4", (7, 90), "bfloat16"), ("nf4", (37, 512), "float32"), ("fp4", (10, 128), "float16")],
        *(FOUR_BIT, SHAPES, DTYPES),
    ),
)
def test_four_bits_are_those_of_bitsandbytes(bnb, name, shape, dtype):
    array = weights(*shape, dtype)
    held = as_users(FOUR_BIT[name].hold, jnp.array(array))
    codes, state = bnb.quantize_4bit(as_torch(array), quant_type=name)
    same(held.codes, codes)
    # the order in which torch sums depends on threads and instructions: its mean is not always ours
    mean = float(held.offset[0])
    assert mean == pytest.approx(float(state.absmax.mean()), rel=2**-22)
    nested_codes, nested = bnb.quantize_blockwise(state.absmax - mean, blocksize=256)
    same(held.absmax, nested_codes)
    same(held.nested_absmax, nested.absmax)
    scales = bnb.dequantize_blockwise(nested_codes, nested) + mean
    same(as_users(lambda w: w.divisible().absmax, held), scales)
    found = as_users(lambda w: w.dequantize(), held)
    assert found.dtype == dtype
    same(found, slow.dequantize(slow.unpacked(codes.numpy(), array.size), scales.numpy(), name, shape, dtype))
    if shape[1] % 64 == 0:  # else its kernel for AVX-512 takes other scales than were stored
        state.absmax = scales
        same(found, bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    mostly_slow([("nf4", (3, 90), "float16")], FOUR_BIT, [(3, 128), (3, 90)], DTYPES),
)
def test_four_bits_are_those_of_the_plain_computation(name, shape, dtype):
    array = weights(*shape, dtype)
    held = as_users(FOUR_BIT[name].hold, jnp.array(array))
    codes, scales = slow.quantize(array, name)
    same(held.codes, slow.packed(codes))
    mean = np.asarray(held.offset)[0]
    assert mean == pytest.approx(scales.astype(np.float64).mean(), rel=2**-23)
    nested_codes, nested = slow.compress(scales, mean)
    same(held.absmax, nested_codes)
    same(held.nested_absmax, nested)
    expected = slow.dequantize(codes, slow.expand(nested_codes, nested, mean), name, shape, dtype)
    same(as_users(lambda w: w.dequantize(), held), expected)


@pytest.mark.parametrize("dtype", mostly_slow([("float16",)], DTYPES))
def test_integers_are_those_of_bitsandbytes(bnb, dtype):
    array = weights(40, 576, dtype, seed=4)
    held = as_users(Int8.hold, jnp.array(array))
    codes, largest, _ = bnb.int8_vectorwise_quant(as_torch(array))
    plain_codes, plain_largest = slow.quantize_rows(array)
    for found, expected, plain in ((held.codes, codes, plain_codes), (held.absmax, largest, plain_largest)):
        same(found, expected)
        same(found, plain)
    found = as_users(lambda w: w.dequantize(), held)
    wide = bnb.int8_vectorwise_dequant(codes, largest)
    same(found, wide.to(getattr(torch, dtype)))
    same(found, slow.dequantize_rows(plain_codes, plain_largest).astype(slow.DTYPES[dtype]))


def test_the_dynamic_map_and_the_search_in_it_are_those_of_bitsandbytes(bnb):
    same(DYNAMIC, bnb.create_dynamic_map())
    entries = np.linspace(-1, 1, 255 * 400, dtype=np.float32).reshape(-1, 255)
    entries = np.concatenate([entries, np.ones((400, 1), np.float32)], axis=1)
    codes, _ = bnb.quantize_blockwise(torch.tensor(entries).reshape(-1), blocksize=256)
    same(as_users(nearest_dynamic, jnp.array(entries)), codes)


def test_what_was_quantized_from_float16_stands_for_float16(bnb):
    array = weights(8, 128, "float16") / np.float16(512)  # subnormal numbers among them
    codes, state = bnb.quantize_4bit(as_torch(array), quant_type="nf4")
    scales = jnp.array(state.absmax.numpy().reshape(8, 2))
    expected = bnb.dequantize_4bit(codes, state)
    for dtype in ("float32", "bfloat16"):
        held = NF4(jnp.array(codes.numpy().reshape(8, 64)), scales, None, None, jnp.dtype(dtype), np.float16)
        same(as_users(lambda w: w.dequantize(), held), expected.to(getattr(torch, dtype)))


def test_rounding_is_that_of_a_conversion():
    rng = np.random.default_rng(0)
    x = rng.normal(size=20_000) * 10.0 ** rng.integers(-9, 5, 20_000)
    x = np.append(x, [0, -0.0, 65519, 65520, 2**-24, 2**-25, 2**-25 * 1.001, -(2.0**-14)]).astype(np.float32)
    for name, dtype in slow.DTYPES.items():
        with np.errstate(over="ignore"):
            expected = x.astype(dtype).astype(np.float32)
        same(as_users(lambda x, name=name: rounded(x, name), jnp.array(x)), expected)


def test_a_sealed_product_is_rounded_before_it_is_summed():
    x = jnp.array(np.random.default_rng(0).normal(size=(3, 4096)), jnp.float32)
    plain = np.asarray(x[0]) * np.asarray(x[1]) + np.asarray(x[2])
    same(as_users(lambda x: sealed(x[0] * x[1]) + x[2], x), plain)


@pytest.mark.parametrize(
    ("kind", "dtype"), mostly_slow([(NF4, "bfloat16")], [NF4, FP4, Int8], ["float32", "bfloat16"])
)
def test_products_are_those_with_the_array_in_users_programs_too(kind, dtype):
    held = as_users(kind.hold, jnp.array(weights(64, 192, dtype)))
    x = jnp.array(np.random.default_rng(1).normal(size=(5, 192)), dtype)

    def both(x, weight):
        y, pull = jax.vjp(lambda x: linear(x, weight), x)
        entries = (weight.dequantize() if hasattr(weight, "dequantize") else weight).astype(jnp.float32)
        return y, pull(y)[0], entries + 0.1

    array = as_users(lambda w: w.dequantize(), held)
    same(array, as_users(lambda w: w.divisible().dequantize(), held))
    for found, expected in zip(as_users(both, x, held), as_users(both, x, array), strict=True):
        same(found, expected)


def test_bytes_of_a_parameter():
    for config in (ModelConfig.llama2_7b(), ModelConfig.smollm2_135m()):
        for kind, most in ((NF4, 0.52), (FP4, 0.52), (Int8, 1.01)):
            params = abstract_params(config, jnp.bfloat16, storage=kind)
            linears = [params[name] for name in ADAPTED]
            assert sum(map(nbytes, linears)) <= most * sum(weight.size for weight in linears)


def test_kinds_are_told_apart_by_caches():
    array = jnp.array(weights(4, 64, "float32"))
    structures = [jax.tree.structure(kind.hold(array)) for kind in (NF4, FP4, Int8)]
    assert all(a != b for i, a in enumerate(structures) for b in structures[:i])


@pytest.mark.slow
def test_fused_instructions_round_nothing_otherwise():
    """The tests' programs have none (conftest.py)."""
    run_as_users(__file__, "not otherwise")
