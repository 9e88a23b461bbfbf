"""Building for TensorRT-LLM: its release and its API, the options, and what the manifest says. A stand-in answers."""

import os
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qwen2vl_trt.building.plan import BuildRequest, plan_build
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.commands.options import Parser, add_build_arguments
from qwen2vl_trt.engines.backends import BACKENDS, find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.options import TensorRTLLMOptions
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.engines.tensorrt_llm_api import differences, make_llm, sampling_params, vision_input
from qwen2vl_trt.errors import BuildError, EngineError, MissingDependencyError
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.rope_scaling import LinearScaling
from tests.support import fake_tensorrt_llm
from tests.support.quantized import awq, quantized_checkpoint

TINY = resolve_model("tiny")


@pytest.fixture
def trtllm(monkeypatch):
    yield from fake_tensorrt_llm.installed(monkeypatch)


def built(folder, model=TINY, precision=None, profile=None, **options):
    backend, precision = find_backend("tensorrt-llm", precision)
    backend = replace(backend, options=TensorRTLLMOptions(**options))
    build_engines(model, backend, precision, profile or BuildProfile(), folder)
    return Manifest.read(folder)


def plan(*arguments):
    parser = Parser()
    add_build_arguments(parser)
    return plan_build(BuildRequest.from_arguments(parser.parse_args(["--backend", "tensorrt-llm", *arguments])))


class TestRelease:
    @pytest.mark.skipif(find_spec("tensorrt_llm") is not None, reason="TensorRT-LLM is installed here")
    def test_missing(self):
        with pytest.raises(MissingDependencyError, match=r"not installed: pip install -e '.*\[tensorrt-llm\]'"):
            find_backend("tensorrt-llm", None)

    def test_without_its_libraries(self, monkeypatch, trtllm, tmp_path):
        fake_tensorrt_llm.forget()
        (tmp_path / "tensorrt_llm.py").write_text("raise OSError('libmpi.so.40: cannot open\\nshared object')")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(
            MissingDependencyError, match=r"cannot be imported .libmpi.so.40: cannot open shared object"
        ):
            BACKENDS["tensorrt-llm"].load()

    @pytest.mark.parametrize("version", ["1.2.0", "1.2.0rc5", "1.4.0rc1"])
    def test_supported(self, trtllm, monkeypatch, version):
        monkeypatch.setattr(trtllm, "__version__", version)
        assert BACKENDS["tensorrt-llm"].load() is trtllm

    @pytest.mark.parametrize("version", ["0.21.0", "1.1.0", "2.0.0"])
    def test_another(self, trtllm, monkeypatch, version):
        monkeypatch.setattr(trtllm, "__version__", version)
        with pytest.raises(
            EngineError, match=rf"needs tensorrt_llm 1.2 or later, older than 2; {version} is installed"
        ):
            find_backend("tensorrt-llm", None)


class TestSignatures:
    """What the stand-in has is what the documentation has; a release that lost a part of it is refused by name."""

    def test_all_there(self, trtllm):
        assert differences(trtllm) == []

    def test_a_parameter_less(self, trtllm, monkeypatch):
        def generate_async(self, inputs, sampling_params=None, streaming=False):
            """No salt."""

        monkeypatch.setattr(trtllm.LLM, "generate_async", generate_async)
        with pytest.raises(EngineError, match=r"lacks .*: LLM.generate_async without cache_salt. Install another"):
            BACKENDS["tensorrt-llm"].load()

    def test_a_renamed_argument_of_the_model(self, trtllm, monkeypatch):
        fields = dict(trtllm.llmapi.TorchLlmArgs.model_fields)
        fields["most_tokens"] = fields.pop("max_num_tokens")
        monkeypatch.setattr(trtllm.llmapi.TorchLlmArgs, "model_fields", fields)
        assert differences(trtllm) == ["LLM.__init__ without max_num_tokens"]

    def test_arguments_that_are_named_need_no_model_of_them(self, trtllm, monkeypatch):
        names = "model tensor_parallel_size dtype max_batch_size max_input_len max_seq_len max_num_tokens"
        scope = {}
        exec(f"def __init__(self, {', '.join(names.split())}, kv_cache_config): ...", scope)
        monkeypatch.setattr(trtllm.LLM, "__init__", scope["__init__"])
        monkeypatch.delattr(trtllm.llmapi, "TorchLlmArgs")
        assert differences(trtllm) == []

    @pytest.mark.parametrize(
        ("owner", "kept", "missing"),
        [
            ("KvCacheConfig", "free_gpu_memory_fraction", "KvCacheConfig without enable_block_reuse"),
            ("CompletionOutput", "token_ids, finish_reason", "CompletionOutput without stop_reason"),
        ],
    )
    def test_a_field_less(self, trtllm, monkeypatch, owner, kept, missing):
        scope = {}
        exec(f"class {owner}:\n    def __init__(self, {kept}): ...", scope)
        monkeypatch.setattr(trtllm.llmapi, owner, scope[owner])
        assert differences(trtllm) == [missing]

    def test_sampling_and_output(self, trtllm, monkeypatch):
        monkeypatch.setattr(
            trtllm, "SamplingParams", type("SamplingParams", (), {"__init__": lambda self, top_k: None})
        )
        monkeypatch.delattr(trtllm.llmapi.RequestOutput, "abort")
        sampling, output = differences(trtllm)
        assert sampling.startswith("SamplingParams without max_tokens, end_id,")
        assert "top_k," not in sampling
        assert output == "RequestOutput without abort"

    def test_a_class_less(self, trtllm, monkeypatch):
        monkeypatch.delattr(trtllm, "LLM")
        monkeypatch.delattr(trtllm.llmapi, "KvCacheConfig")
        assert differences(trtllm) == ["LLM", "KvCacheConfig without enable_block_reuse, free_gpu_memory_fraction"]


class TestVision:
    def test_embeddings_where_they_are_taken(self, trtllm):
        assert vision_input() == "embeddings"

    def test_its_own_without_preprocessed_inputs(self, trtllm, monkeypatch):
        monkeypatch.delattr(sys.modules["tensorrt_llm.llmapi.llm"], "PreprocessedInputs")
        assert vision_input() == "own"

    def test_its_own_where_they_carry_something_else(self, trtllm, monkeypatch):
        params = types.SimpleNamespace  # takes no multimodal_data
        monkeypatch.setattr(sys.modules["tensorrt_llm.inputs.multimodal"], "MultimodalParams", params)
        assert vision_input() == "own"


class TestArguments:
    def test_of_the_model(self, trtllm):
        llm = make_llm(TINY.folder, 2, torch.bfloat16, 4, 100, 200, 300, False, 0.7)
        cache = llm.arguments.pop("kv_cache_config")
        assert (cache.enable_block_reuse, cache.free_gpu_memory_fraction) == (False, 0.7)
        assert llm.arguments == {
            "tensor_parallel_size": 2,
            "dtype": "bfloat16",
            "max_batch_size": 4,
            "max_input_len": 100,
            "max_seq_len": 200,
            "max_num_tokens": 300,
        }
        assert llm.folder == TINY.folder

    def test_of_greedy_sampling(self, trtllm):
        found = sampling_params(7, 0.0, 50, 0.9, False, (5, 6), 4)
        assert (found.max_tokens, found.end_id, found.stop_token_ids, found.pad_id) == (7, 5, [6], 4)
        assert (found.top_k, found.top_p, found.temperature) == (1, None, None)
        assert found.include_stop_str_in_output
        assert not found.ignore_eos

    def test_of_draws(self, trtllm):
        found = sampling_params(7, 0.5, 0, 0.9, True, (5, 6), 4)
        assert (found.top_k, found.top_p, found.temperature) == (0, 0.9, 0.5)
        assert found.ignore_eos
        assert found.stop_token_ids is None


class TestBuild:
    def test_the_manifest_says_how(self, trtllm, tmp_path):
        mapper = __import__(
            "tensorrt_llm._torch.models.checkpoints.hf.qwen2vl_weight_mapper", fromlist=["x"]
        ).Qwen2VLHfWeightMapper
        mapper.asked.clear()
        manifest = built(tmp_path / "engines")
        assert (manifest.backend, manifest.precision) == ("tensorrt-llm", "bf16")
        assert manifest.options == {"tp_size": 1, "vision": "embeddings", "vision_backend": "torch"}
        assert manifest.versions["tensorrt_llm"] == "1.3.0"
        assert set(mapper.asked) == {"visual", "model", "lm_head"}  # its weight mapper found every tensor
        (weights,) = Checkpoint(tmp_path / "engines").folder.glob("*.safetensors")
        assert weights.stat().st_nlink > 1  # linked, not copied

    def test_another_release_wants_other_engines(self, trtllm, tmp_path, monkeypatch):
        built(tmp_path / "engines")
        monkeypatch.delattr(sys.modules["tensorrt_llm.llmapi.llm"], "PreprocessedInputs")
        with pytest.raises(BuildError, match="holds other engines: TensorRT-LLM's input embeddings there, own wanted"):
            built(tmp_path / "engines")
        assert built(tmp_path / "others").options["vision"] == "own"

    def test_options_of_the_command(self, trtllm):
        found = plan("--tp-size", "2", "--max-num-tokens", "9000").backend.options
        assert found == TensorRTLLMOptions(tp_size=2, max_num_tokens=9000)
        assert found.tokens_per_step(BuildProfile()) == 9000
        assert TensorRTLLMOptions().tokens_per_step(BuildProfile()) == 8192
        assert TensorRTLLMOptions().tokens_per_step(BuildProfile(max_input_len=10000, max_seq_len=20000)) == 10000

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--tp-size", "0"], "--tp-size is 0; it must be at least 1"),
            (["--strip-weights"], "--strip-weights is for the TensorRT backends, not for tensorrt-llm"),
            (["--precision", "fp32"], "backend tensorrt-llm cannot be built in 'fp32', only in bf16, fp8"),
        ],
    )
    def test_refused_options(self, trtllm, arguments, message):
        with pytest.raises(BuildError, match=message):
            plan(*arguments)

    def test_its_options_are_for_it_alone(self):
        with pytest.raises(BuildError, match="--tp-size is for backend tensorrt-llm, not for torch"):
            plan("--backend", "torch", "--tp-size", "2")

    def test_heads_that_do_not_divide(self, trtllm, tmp_path):
        config = Checkpoint(TINY.folder).config.text
        with pytest.raises(BuildError, match=r"--tp-size 3 does not divide this model's 4 attention heads"):
            built(tmp_path / "engines", tp_size=3)
        assert not (tmp_path / "engines" / "manifest.json").exists()
        qwen_7b = replace(config, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944)
        TensorRTLLMOptions(tp_size=4).check_model(qwen_7b)
        with pytest.raises(BuildError, match=r"8 does not divide this model's 28 .*heads and 4 key.*; 1, 2, 4 do$"):
            TensorRTLLMOptions(tp_size=8).check_model(qwen_7b)
        qwen_3b = replace(config, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008)
        with pytest.raises(BuildError, match=r"4 does not divide this model's 2 key-value heads; 1, 2 do$"):
            TensorRTLLMOptions(tp_size=4).check_model(qwen_3b)

    def test_scaled_positions_are_refused(self):
        config = Checkpoint(TINY.folder).config.text
        with pytest.raises(BuildError, match=r"scaled \(rope_scaling\), which is not for backend tensorrt-llm"):
            TensorRTLLMOptions().check_model(replace(config, rope_scaling=LinearScaling(2.0)))

    def test_a_step_that_holds_no_prompt(self, trtllm, tmp_path):
        with pytest.raises(BuildError, match=r"--max-num-tokens 100 is below --max-input-len 6,144"):
            built(tmp_path / "engines", max_num_tokens=100)

    def test_a_vision_engine_that_would_never_run(self, trtllm, tmp_path, monkeypatch):
        monkeypatch.delattr(sys.modules["tensorrt_llm.llmapi.llm"], "PreprocessedInputs")
        with pytest.raises(BuildError, match="--vision-backend tensorrt needs a TensorRT-LLM that takes embeddings"):
            built(tmp_path / "engines", vision_backend="tensorrt")

    def test_packed_weights_are_refused(self, trtllm, tmp_path):
        settings = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
        folder, _ = quantized_checkpoint(TINY.folder, tmp_path, settings, partial(awq, group_size=128))
        with pytest.raises(BuildError, match=r"is quantised \(AWQ\), which TensorRT-LLM would load by itself"):
            built(tmp_path / "engines", replace(TINY, folder=folder), "bf16")

    def test_fp8_of_both_towers_is_refused(self, trtllm, tmp_path, fp8_checkpoint):
        model = replace(TINY, folder=fp8_checkpoint)
        with pytest.raises(BuildError, match="has FP8 layers in its vision tower, where TensorRT-LLM takes none"):
            built(tmp_path / "engines", model, "fp8")


class TestCommands:
    """As a user runs them, here on a machine without a GPU."""

    ROOT = Path(__file__).parents[2]

    def run(self, command, *arguments, fake=True, folder):
        environment = os.environ | ({"PYTHONPATH": str(fake_tensorrt_llm.FAKES)} if fake else {})
        return subprocess.run(
            [sys.executable, self.ROOT / command, "--backend", "tensorrt-llm", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )

    @pytest.mark.skipif(find_spec("tensorrt_llm") is not None, reason="TensorRT-LLM is installed here")
    def test_missing(self, tmp_path):
        done = self.run("build_engines.py", "--tp-size", "4", fake=False, folder=tmp_path)
        assert done.returncode == 2
        assert done.stderr == (
            "error: backend tensorrt-llm needs tensorrt_llm, which is not installed:"
            f" pip install -e '{self.ROOT}[tensorrt-llm]'\n"
        )

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the stand-in would seem to run on it")
    def test_build_then_no_gpu(self, tmp_path):
        done = self.run("build_engines.py", "--tp-size", "2", folder=tmp_path)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "artifacts/tiny-tensorrt-llm-bf16: built")
        for device in ((), ("--device", "cpu")):
            done = self.run("run.py", "--tp-size", "2", "--prompt", "Hi", *device, folder=tmp_path)
            assert done.returncode == 2
            (line,) = done.stderr.splitlines()
            assert "sees none here" in line if not device else "among 2 GPUs" in line
