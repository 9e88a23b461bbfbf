"""Compiled steps against the plain functions, at the widths of the tiny and of the published models."""

import logging
from functools import cache

import pytest
import torch
from torch import nn

from qwen2vl_trt import fused_ops
from qwen2vl_trt.fused_ops import FusedOps
from qwen2vl_trt.layers import RMSNorm
from qwen2vl_trt.mrope import rotary_cos_sin
from qwen2vl_trt.ops import quantize_fp8, rotate
from tests.support.bounds import FP32
from tests.support.compiled_steps import compilations, graph_breaks, need_a_compiler
from tests.support.models import relative_error
from tests.support.thorough import THOROUGH

SECTIONS = {128: (16, 24, 24), 32: (4, 6, 6)}
SCALE = torch.tensor(0.02)
SIZES = {  # width, intermediate, heads, kv heads, head size; the vision tower's heads and head size
    "small": (96, 342, 3, 1, 32, 6, 16),  # no power of two, no multiple of a vector
    "7B": (3584, 18944, 28, 4, 128, 16, 80),
}
COMPILED = [("small", torch.float32), ("7B", torch.bfloat16)]
"""Each costs ten seconds of a compiler; THOROUGH=1 takes the other two pairs as well."""


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mean_error(found, expected):
    """Relative; the largest error of a few numbers is luck in BF16."""
    return float((found.float() - expected.float()).abs().mean() / expected.float().abs().mean())


class Steps:
    """Every step of :class:`FusedOps` on random input of T tokens."""

    def __init__(self, size, dtype, functions):
        self.functions, self.dtype = functions, dtype
        self.width, self.inner, self.heads, self.kv_heads, self.head, self.vision_heads, self.vision_head = SIZES[size]
        self.norm = RMSNorm(self.width, eps=1e-6, dtype=dtype)
        nn.init.normal_(self.norm.weight, 1, 0.1, generator=torch.Generator().manual_seed(1))

    def tensor(self, *shape, seed=0):
        return noise(*shape, dtype=self.dtype, seed=seed)

    def angles(self, tokens):
        frequencies = 1.0 / 10000 ** (torch.arange(0, self.head, 2) / self.head)
        positions = torch.randint(0, 5000, (3, 1, tokens), generator=torch.Generator().manual_seed(2))
        return self.functions.rotary_cos_sin(positions, frequencies, SECTIONS[self.head], 1.0), (positions, frequencies)

    def run(self, tokens, batch=1):
        """All results by name; caches as they are afterwards."""
        x, y = self.tensor(batch, tokens, self.width), self.tensor(batch, tokens, self.width, seed=1)
        gate_up = self.tensor(batch, tokens, 2 * self.inner)
        found = {
            "norm": self.functions.rms_norm(x, self.norm, None),
            "norm_fp8": self.functions.rms_norm(x, self.norm, SCALE),
        }
        found["total"], found["add_norm"] = self.functions.add_rms_norm(x, y, self.norm, None)
        found["total_fp8"], found["add_norm_fp8"] = self.functions.add_rms_norm(x, y, self.norm, SCALE)
        found["gate"], found["gate_fp8"] = (self.functions.silu_and_mul(gate_up, scale) for scale in (None, SCALE))
        found["quantize"] = self.functions.quantize_fp8(x, SCALE)
        count = batch * tokens
        (found["cos"], found["sin"]), _ = self.angles(count)
        qkv = self.tensor(batch, tokens, (self.heads + 2 * self.kv_heads) * self.head)
        caches = [self.tensor(7, 40, self.kv_heads, self.head, seed=seed) for seed in (3, 4)]  # 7 pages of 40 tokens
        slot_mapping = torch.randperm(7 * 40, generator=torch.Generator().manual_seed(5))[:count]
        cos, sin = found["cos"].view(batch, tokens, -1), found["sin"].view(batch, tokens, -1)
        found["q"] = self.functions.reshape_and_cache(qkv, cos, sin, *caches, slot_mapping)
        found["k_cache"], found["v_cache"] = caches
        vision_cos, vision_sin = (noise(batch, tokens, self.vision_head // 2, seed=seed) for seed in (6, 7))
        vision_qkv = self.tensor(batch, tokens, 3 * self.vision_heads * self.vision_head)
        found["rotated"] = self.functions.rotary_embedding(vision_qkv, vision_cos, vision_sin, 2 * self.vision_heads)
        return found


@cache
def compiled(size, dtype):
    need_a_compiler()
    functions = FusedOps()
    steps = Steps(size, dtype, functions)
    functions.compile([lambda: steps.run(1), lambda: steps.run(9)])
    assert functions.compiled
    return steps


@pytest.mark.parametrize("batch", [(1, 1), (1, 2), (1, 9), (3, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("size", SIZES if THOROUGH else ["small"])
@torch.no_grad()
def test_fp32_equals_the_plain_functions(size, batch):
    found = compiled(size, torch.float32).run(batch[1], batch[0])
    expected = Steps(size, torch.float32, FusedOps()).run(batch[1], batch[0])
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert found[name].shape == expected[name].shape
        if expected[name].dtype == torch.float8_e4m3fn:
            same = (found[name].float() == expected[name].float()).float().mean()
            assert same > 0.999, f"{name}: a last bit may turn a rounding, of few"
        else:
            assert relative_error(found[name], expected[name]) < FP32, name


@pytest.mark.parametrize("batch", [(1, 1), (1, 9), (3, 2)], ids=str)
@pytest.mark.parametrize("size", SIZES if THOROUGH else ["7B"])
@torch.no_grad()
def test_bf16_is_no_further_from_fp32_than_the_plain_functions(size, batch):
    found = compiled(size, torch.bfloat16).run(batch[1], batch[0])
    plain = Steps(size, torch.bfloat16, FusedOps())
    exact = Steps(size, torch.float32, FusedOps())
    exact.norm.weight.copy_(plain.norm.weight)
    exact.tensor = lambda *shape, seed=0: noise(*shape, dtype=torch.bfloat16, seed=seed).float()
    exact = exact.run(batch[1], batch[0])
    plain = plain.run(batch[1], batch[0])
    for name in exact:
        ours, theirs = (mean_error(result[name], exact[name]) for result in (found, plain))
        assert ours <= theirs * 1.02 + 1e-6, name
        assert ours < (0.03 if exact[name].dtype == torch.float8_e4m3fn else 0.005), name


@torch.no_grad()
def test_the_plain_functions_are_the_modules_arithmetic():
    """What both are compared with, written once more as the modules write it."""
    steps = Steps("small", torch.float32, FusedOps())
    found = steps.run(4, 2)
    x, y = steps.tensor(2, 4, steps.width), steps.tensor(2, 4, steps.width, seed=1)
    assert relative_error(found["add_norm"], steps.norm(x + y)) < FP32
    assert torch.equal(found["add_norm_fp8"].float(), quantize_fp8(found["add_norm"], SCALE).float())
    (cos, sin), (positions, frequencies) = steps.angles(8)
    expected = rotary_cos_sin(positions, frequencies, SECTIONS[steps.head], 1.0)
    assert torch.equal(cos, expected[0])
    assert torch.equal(sin, expected[1])
    qkv = steps.tensor(2, 4, 5 * steps.head).view(2, 4, 5, steps.head).transpose(1, 2)
    cos, sin = cos.view(2, 4, -1), sin.view(2, 4, -1)
    assert torch.equal(found["q"], rotate(qkv[:, :3], cos, sin))


@pytest.mark.parametrize("kind", COMPILED)
@torch.no_grad()
def test_the_cache_is_written_at_its_places_and_nowhere_else(kind):
    steps = compiled(*kind)
    before = [steps.tensor(7, 40, steps.kv_heads, steps.head, seed=seed) for seed in (3, 4)]
    slot_mapping = torch.randperm(7 * 40, generator=torch.Generator().manual_seed(5))[:6]
    after = steps.run(3, 2)
    written = torch.zeros(7, 40, dtype=torch.bool)
    written[slot_mapping // 40, slot_mapping % 40] = True
    for name, old in zip(("k_cache", "v_cache"), before):
        changed = (after[name] != old).any(dim=-1).all(dim=-1)
        untouched = (after[name] == old).all(dim=-1).all(dim=-1)
        assert torch.equal(changed, written), name
        assert torch.equal(untouched, ~written), name


@torch.no_grad()
def test_a_number_of_tokens_compiles_nothing_anew():
    steps = compiled("small", torch.float32)
    steps.run(2)
    before = compilations()
    for tokens, batch in ((1, 1), (2, 1), (1, 2), (40, 1), (13, 2), (1, 7), (100, 2)):
        steps.run(tokens, batch)
    assert compilations() == before
    assert not graph_breaks()


@torch.no_grad()
def test_strides_compile_nothing_anew():
    """One token of attention's output, a slice of a wider tensor, a transposed one: all reach it as ``[T, C]``."""
    steps = compiled("small", torch.float32)
    before, width = compilations(), steps.width
    for x in (
        noise(4, 1, 1, width // 4).transpose(1, 2).permute(1, 2, 0, 3).reshape(1, 1, width),
        noise(1, 3, 2 * width)[..., :width],
        noise(1, 5, width)[:, 2:3],
        noise(width, 6).T[None],
        noise(3, 1, width).transpose(0, 1),
        noise(1, 9, width)[:, 4:],
    ):
        found, expected = (functions.rms_norm(x, steps.norm, None) for functions in (steps.functions, FusedOps()))
        assert relative_error(found, expected) < FP32
    assert compilations() == before


def without_compiling(monkeypatch, wrong=None):
    """In place of the compiler: the function as it is, or what ``wrong`` makes of the named one."""
    changes = wrong or {}
    monkeypatch.setattr(fused_ops, "_compiled", lambda function: changes.get(function.__name__, function))


@pytest.mark.parametrize("name", fused_ops._PLAIN)
@torch.no_grad()
def test_a_wrong_compiler_is_found_out(monkeypatch, caplog, name):
    """Each function in turn a tenth too large, or without what it should have written."""

    def larger(*args):
        found = fused_ops._PLAIN[name](*args)
        if isinstance(found, tuple):
            return found[0], found[1] * 1.1
        return (found.float() * 1.1).to(found.dtype)

    functions = FusedOps()
    steps = Steps("small", torch.float32, functions)
    expected = steps.run(5)
    without_compiling(monkeypatch, {name: larger})
    functions.compile([lambda: steps.run(5)])
    assert not functions.compiled
    assert len(caplog.records) == 1
    assert f"compiled function '{name}' is wrong" in caplog.text
    found = steps.run(5)
    assert all(torch.equal(found[key].float(), expected[key].float()) for key in expected), "the plain functions serve"


@pytest.mark.parametrize("forgotten", [0, 1])
@torch.no_grad()
def test_what_is_not_written_is_found_out(monkeypatch, caplog, forgotten):
    def forgets(*args):
        args = list(args)
        args[3 + forgotten] = args[3 + forgotten].clone()
        return fused_ops.reshape_and_cache(*args)

    functions = FusedOps()
    steps = Steps("small", torch.float32, functions)
    without_compiling(monkeypatch, {"reshape_and_cache": forgets})
    functions.compile([lambda: steps.run(5)])
    assert not functions.compiled
    assert "compiled function 'reshape_and_cache' is wrong by 1" in caplog.text


@torch.no_grad()
def test_without_a_compiler_one_line_says_so(monkeypatch, caplog, tmp_path):
    """The real thing: Inductor looks for a C++ compiler and finds none."""
    from torch._inductor import config

    need_a_compiler()
    functions = FusedOps()
    steps = Steps("small", torch.float32, functions)
    expected = steps.run(3)
    caplog.set_level(logging.WARNING)
    with config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),), "force_disable_caches": True}):
        functions.compile([lambda: steps.run(3)])
        assert not functions.compiled
    ours = [record for record in caplog.records if record.name == fused_ops.__name__]
    assert len(ours) == 1
    assert "not compiled, which costs time" in ours[0].getMessage()
    assert "\n" not in ours[0].getMessage()
    assert torch.equal(steps.run(3)["gate"], expected["gate"])


@torch.no_grad()
def test_models_of_one_process_do_not_use_up_each_others_compilations(monkeypatch):
    """PyTorch compiles a function's code eight times at most; each model here has two sizes of batch."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, options: compiler(f, dynamic=dynamic, backend="eager"))
    models = []
    for number in range(torch._dynamo.config.recompile_limit + 2):
        functions = FusedOps()
        norm = RMSNorm(8 + number, eps=1e-6)

        def run(tokens, functions=functions, norm=norm):
            return functions.rms_norm(noise(tokens, *norm.normalized_shape), norm, None)

        functions.compile([lambda run=run: run(1), lambda run=run: run(3)])
        assert functions.compiled
        models.append(run)
    before = compilations()
    for run in models:
        run(1)
        run(5)
    assert compilations() == before
    assert before >= 2 * len(models)
