"""TensorRT engines, built for real by TensorRT for RTX without a GPU; and what goes wrong, said in one line."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import onnx
import pytest

import qwen2vl_trt.engines.tensorrt_build as tensorrt_build
from qwen2vl_trt.benchmarks.random_model import config_of, write_sparse_checkpoint
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.backends import TENSORRT, TENSORRT_RTX, BuildJob, find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.options import TensorRTOptions
from qwen2vl_trt.engines.precision import BF16
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.engines.progress import BuildSteps, progress_bar
from qwen2vl_trt.engines.tensorrt_build import (
    build_plans,
    load_timing_cache,
    parse,
    save_timing_cache,
    timing_cache_path,
)
from qwen2vl_trt.engines.tensorrt_callbacks import tensorrt_log
from qwen2vl_trt.errors import BuildError, EngineError, MissingDependencyError
from qwen2vl_trt.files import atomic_file
from qwen2vl_trt.hub import resolve_model
from tests.support.engine_folders import PROFILE, build
from tests.support.thorough import THOROUGH

ROOT = Path(__file__).parents[2]
ONNX_BF16 = onnx.TensorProto.BFLOAT16
PLANS = {"vision.engine", "decoder.engine", "vision.layers", "decoder.layers"}


def built_layers(path, profile=0):
    """The names of the layers that TensorRT made, of one profile."""
    names = re.findall(r"^Name: (.*?), LayerType: ", path.read_text(), re.MULTILINE)
    return [name for name in names if name.endswith("[profile 1]") or f"_myl{profile}_" in name]


def assert_fused(folder, config):
    """One matrix product for q, k and v, one for gate and up, one attention kernel a layer, in every profile."""
    for profile in (0, 1):
        names = [name.replace(f" [profile {profile}]", "") for name in built_layers(folder / "decoder.layers", profile)]
        for i in range(config.text.num_hidden_layers):
            layer = [name for name in names if f"model.layers.{i}." in name and "Gemm" in name]
            assert any(all(f"{part}_proj.Gemm" in name for part in "qkv") for name in layer), (profile, layer)
            assert any(all(f"{part}_proj.Gemm" in name for part in ("gate", "up")) for name in layer), (
                profile,
                layer,
            )
        assert sum("mha" in name for name in names) == config.text.num_hidden_layers, names
    names = built_layers(folder / "vision.layers")
    for i in range(config.vision.depth):
        parts = [f"blocks.{i}.mlp.{part}_proj.MatMul" for part in ("gate", "up")]
        assert any(all(part in name for part in parts) for name in names), names
    assert sum("mha" in name for name in names) == config.vision.depth, names


class TestTinyModel:
    def test_the_folder(self, rtx_engines):
        folder = rtx_engines.folder("bf16")
        manifest = Manifest.read(folder)
        manifest.verify(folder)
        assert manifest.files["vision.engine"].bytes == (folder / "vision.engine").stat().st_size
        assert set(manifest.files) == {"vision.onnx", "decoder.onnx", *PLANS}
        assert (manifest.backend, manifest.precision, manifest.options) == ("tensorrt-rtx", "bf16", {})
        assert manifest.versions["tensorrt_rtx"] == TENSORRT_RTX.load().__version__
        assert not [path.name for path in folder.iterdir() if re.fullmatch(r"\..*engine.*", path.name)]

    def test_fusions(self, rtx_engines, rtx_checkpoint):
        assert_fused(rtx_engines.folder("bf16"), Checkpoint(rtx_checkpoint).config)

    def test_the_cache_has_a_static_length(self, rtx_engines):
        graph = onnx.load(rtx_engines.folder("bf16") / "decoder.onnx", load_external_data=False).graph
        cache = next(value for value in graph.input if value.name == "k_cache_0")
        assert cache.type.tensor_type.shape.dim[2].dim_value == PROFILE.max_seq_len

    def test_fp32(self, rtx_engines):
        folder = rtx_engines.folder("fp32")
        assert (folder / "vision.engine").stat().st_size > 1_000_000
        assert (folder / "decoder.engine").stat().st_size > 1_000_000

    def test_nothing_is_built_twice(self, rtx_engines, rtx_checkpoint, monkeypatch):
        monkeypatch.setattr(tensorrt_build, "parse", None)
        backend, _ = find_backend("tensorrt-rtx", "bf16")
        model = resolve_model(rtx_checkpoint)
        assert not build_engines(model, backend, "bf16", PROFILE, rtx_engines.folder("bf16"))
        other = replace(backend, options=TensorRTOptions(weight_streaming=True))
        with pytest.raises(BuildError, match=r"--weight-streaming default there, True wanted\. Pass --force"):
            build_engines(model, other, "bf16", PROFILE, rtx_engines.folder("bf16"))


SMALLEST = BuildProfile(min_hw_dims=4, max_hw_dims=4, max_batch_size=1, max_num_seqs=1, max_input_len=1, max_seq_len=2)
LARGEST = BuildProfile(
    min_hw_dims=4, max_hw_dims=16384, max_batch_size=64, max_num_seqs=64, max_input_len=16384, max_seq_len=20480
)


@pytest.mark.parametrize("profile", [SMALLEST, LARGEST], ids=["smallest", "largest"])
def test_both_ends_of_the_limits(trt, rtx_checkpoint, tmp_path, profile):
    folder = build(rtx_checkpoint, tmp_path / "engines", "tensorrt-rtx", "bf16", profile)
    assert Manifest.read(folder).profile == profile


def test_a_cache_too_long_for_a_fused_kernel(trt, rtx_checkpoint, tmp_path):
    """Prompts have one at any length; a decode step over so many keys is taken apart, and no build fails for it."""
    layers = Checkpoint(rtx_checkpoint).config.text.num_hidden_layers
    profile = BuildProfile(
        min_hw_dims=4, max_hw_dims=64, max_batch_size=2, max_num_seqs=2, max_input_len=4096, max_seq_len=40960
    )
    build_rtx(Checkpoint(rtx_checkpoint), tmp_path, profile)
    fused = [sum("mha" in name for name in built_layers(tmp_path / "decoder.layers", number)) for number in (0, 1)]
    assert fused == [layers, 0]


OF_3B = {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2}
OF_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
OF_72B = {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8}
WIDTHS = {"3B": (OF_3B, 3420, True), "7B": (OF_7B, 3420, False), "72B": (OF_72B, 3456, False)}


@pytest.mark.parametrize("size", WIDTHS if THOROUGH else ["7B"])
def test_a_block_of_each_size(trt, tmp_path, size):
    """One decoder layer, a windowed and a full vision block, a small vocabulary; weights are holes in a sparse file."""
    text, intermediate, tied = WIDTHS[size]
    config = config_of("Qwen2.5-VL-7B", layers=1, blocks=2) | text | {"vocab_size": 512, "tie_word_embeddings": tied}
    config["vision_config"] |= {
        "intermediate_size": intermediate,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [1],
    }
    config |= {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 88, "vision_end_token_id": 89}
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "engines"
    checkpoint.mkdir()
    folder.mkdir()
    write_sparse_checkpoint(checkpoint, config)
    files = build_rtx(Checkpoint(checkpoint), folder, BuildProfile())
    assert {file.name for file in files} == {"vision.onnx", "decoder.onnx", *PLANS}
    assert_fused(folder, Checkpoint(checkpoint).config)
    for graph in ("vision", "decoder"):
        parse(trt, folder / f"{graph}.onnx")  # raises where a fault is left
    shutil.rmtree(tmp_path)


def build_rtx(checkpoint, folder, profile=PROFILE, **options):
    """The plans alone, without a manifest."""
    with progress_bar() as progress:
        steps = BuildSteps(progress, "test", 5)
        backend = TENSORRT_RTX.with_options(options)
        return build_plans(BuildJob(backend, checkpoint, folder, folder, BF16, profile, steps))


class TestOptions:
    def options(self, trt, rtx_engines, **options):
        """A configuration of the builder, and the reason where the plan of the tiny decoder does not build with it."""
        parsed = parse(trt, rtx_engines.folder("bf16") / "decoder.onnx")
        ranges = tensorrt_build.decoder_ranges(PROFILE)
        path = rtx_engines.folder("bf16") / "decoder.onnx"
        return tensorrt_build._configure(trt, parsed.builder, path, ranges, TensorRTOptions(**options))

    def test_they_reach_the_configuration(self, trt, rtx_engines):
        config = self.options(
            trt, rtx_engines, builder_optimization_level=1, weight_streaming=True, compute_capabilities=("8.9", "12.0")
        )
        assert config.builder_optimization_level == 1
        assert config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        assert config.num_compute_capabilities == 2
        assert config.get_compute_capability(1) == trt.ComputeCapability.SM120
        assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
        assert config.num_optimization_profiles == 2

    def test_what_the_runner_counts_on(self, trt, rtx_engines):
        """Memory for the shapes at hand, a decode step that can be captured, FP32 that is FP32."""
        config = self.options(trt, rtx_engines)
        assert config.get_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10)
        assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        assert not config.get_flag(trt.BuilderFlag.TF32)

    def test_attention_with_lengths(self, trt, rtx_engines, rtx_checkpoint, tmp_path):
        """The same fused kernels, and no mask that a decode step would write and read."""
        config = Checkpoint(rtx_checkpoint).config
        build_rtx(Checkpoint(rtx_checkpoint), tmp_path, attention_mask="lengths")
        assert_fused(tmp_path, config)
        masks = []
        for folder in (rtx_engines.folder("bf16"), tmp_path):  # explicit masks, which are the default, and lengths
            steps = (folder / "decoder.layers").read_text().splitlines()
            masks.append(sum("gemv_mha" in line and f",{PROFILE.max_seq_len}]," in line for line in steps))
        assert masks == [config.text.num_hidden_layers, 0]

    def test_decoders_with_either_kind_of_attention(self, trt, rtx_engines, rtx_checkpoint, tmp_path):
        files = build_rtx(Checkpoint(rtx_checkpoint), tmp_path, attention_mask="either")
        names = [f"{name}{suffix}" for name in ("decoder", "decoder-lengths") for suffix in (".engine", ".layers")]
        assert [file.name for file in files if file.name.startswith("decoder")] == ["decoder.onnx", *names]
        steps = [(tmp_path / name).read_text().splitlines() for name in names[1::2]]
        masked = [sum("gemv_mha" in line and f",{PROFILE.max_seq_len}]," in line for line in each) for each in steps]
        assert masked == [Checkpoint(rtx_checkpoint).config.text.num_hidden_layers, 0]

    def test_a_decoder_with_lengths_that_does_not_build(
        self, trt, rtx_engines, rtx_checkpoint, tmp_path, monkeypatch, caplog
    ):
        """As FP16 is reported not to; that with masks is enough."""

        def refused(*arguments):
            if arguments[-1] == "decoder-lengths":
                raise BuildError("Expected 3 live inputs, got 4")
            return [arguments[2].with_suffix(".engine")]

        monkeypatch.setattr(tensorrt_build, "_build_plan", refused)
        files = build_rtx(Checkpoint(rtx_checkpoint), tmp_path, attention_mask="either")
        assert [file.name for file in files if file.suffix == ".engine"] == ["vision.engine", "decoder.engine"]
        assert "got 4. The decoder goes by explicit masks" in caplog.text

    def test_they_are_in_the_manifest_by_name(self):
        assert TensorRTOptions().as_dict() == {}
        options = TensorRTOptions(weight_streaming=True, compute_capabilities=("8.9",))
        assert json.loads(json.dumps(options.as_dict())) == options.as_dict()
        assert options.as_dict() == {"weight_streaming": True, "compute_capabilities": ["8.9"]}

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"builder_optimization_level": 6}, "--builder-optimization-level is 6; it goes from 0 to 5"),
            ({"hardware_compatibility": "all"}, "unknown --hardware-compatibility 'all'; known: none, ampere_plus"),
            ({"attention_mask": "none"}, "unknown --attention-mask 'none'; known: explicit, lengths, either"),
            ({"compute_capabilities": ("sm89",)}, "--compute-capabilities 'sm89' is not of the form 8.9"),
        ],
    )
    def test_impossible_ones_are_named(self, options, said):
        with pytest.raises(BuildError, match=re.escape(said)):
            TensorRTOptions(**options)

    def test_a_gpu_that_the_release_does_not_know(self, trt, rtx_engines):
        with pytest.raises(BuildError, match=r"builds for 7\.5, 8\.0, .*12\.0.*, not for 3\.0"):
            self.options(trt, rtx_engines, compute_capabilities=("3.0",))

    def test_those_of_the_other_variant(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        with pytest.raises(BuildError, match=r"--hardware-compatibility is not for tensorrt-rtx: .*--compute-capab"):
            tensorrt_build._check_machine(TENSORRT_RTX, TensorRTOptions(hardware_compatibility="ampere_plus"))
        with pytest.raises(BuildError, match=r"--compute-capabilities is not for tensorrt,.*--hardware-compatibility"):
            tensorrt_build._check_machine(TENSORRT, TensorRTOptions(compute_capabilities=("8.9",)))

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (
                ("--backend", "torch", "--precision", "fp32", "--weight-streaming"),
                "--weight-streaming is for the TensorRT backends, not for torch",
            ),
            (("--backend", "tensorrt-rtx", "--builder-optimization-level", "9"), "--builder-optimization-level is 9"),
        ],
    )
    def test_on_the_command_line(self, trt, arguments, said, command):
        code, _, errors = command("build", "--model", "tiny", *arguments)
        assert code == 2
        assert said in errors
        assert errors.count("\n") == 1


class TestWhatTensorRTRefuses:
    """Its own reason, with the node's name, and what to do."""

    def test_a_graph_that_cannot_be_parsed(self, trt, tmp_path):
        x, y = (onnx.helper.make_tensor_value_info(name, ONNX_BF16, [4]) for name in "xy")
        node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"], name="blocks.3.odd", domain="elsewhere")
        graph = onnx.helper.make_graph([node], "odd", [x], [y])
        domains = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("elsewhere", 1)]
        path = tmp_path / "odd.onnx"
        path.write_bytes(onnx.helper.make_model(graph, opset_imports=domains).SerializeToString())
        with pytest.raises(BuildError) as refused:
            parse(trt, path)
        assert re.search(
            r"cannot parse it: node blocks\.3\.odd \(NoSuchOperator\): .*Plugin not found", str(refused.value)
        )
        assert "the onnxruntime and torch backends run the same model" in str(refused.value)

    def test_weights_that_are_not_there(self, trt, rtx_engines, tmp_path):
        path = shutil.copy(rtx_engines.folder("bf16") / "vision.onnx", tmp_path)
        with pytest.raises(
            BuildError, match=r"cannot parse it: .*Failed to import initializer: patch_embed\.proj\.weight"
        ):
            parse(trt, Path(path))

    def test_an_engine_that_cannot_be_built(self, trt, rtx_checkpoint, tmp_path):
        with pytest.raises(BuildError) as refused:
            build_rtx(Checkpoint(rtx_checkpoint), tmp_path, compute_capabilities=("7.5",))
        assert re.match(
            r"vision engine: tensorrt_rtx 1\.\S+ .*sm75.*b16.*lower --max-hw-dims or --max-batch-size\.$",
            str(refused.value),
        )
        assert not list(tmp_path.glob("*.engine"))


class TestWritingAPlan:
    def test_a_full_disk(self, trt, rtx_checkpoint, tmp_path):
        """No file may grow beyond 2 MB here; the graphs do not and the plan does, while TensorRT writes it."""
        resource = pytest.importorskip("resource")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                build_rtx(Checkpoint(rtx_checkpoint), tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not [path.name for path in tmp_path.iterdir() if "engine" in path.name]

    def test_what_was_there_stays_until_the_new_is_whole(self, tmp_path, monkeypatch):
        path = tmp_path / "vision.engine"
        path.write_bytes(b"older")

        def full(number):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("qwen2vl_trt.files.os.fsync", full)
        with pytest.raises(OSError, match="No space left on device"), atomic_file(path) as file:
            file.write_bytes(b"newer")
        assert [file.name for file in tmp_path.iterdir()] == ["vision.engine"]
        assert path.read_bytes() == b"older"

    def test_an_interrupt(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "vision.engine"):
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())


class TestMissing:
    @pytest.mark.parametrize("backend", [TENSORRT, TENSORRT_RTX], ids=lambda backend: backend.name)
    def test_not_installed(self, monkeypatch, backend):
        monkeypatch.setattr("qwen2vl_trt.errors.find_spec", lambda name: None if name == backend.package else object())
        said = rf"needs {backend.package}, which is not installed: pip install -e '.*\[{backend.name}\]'"
        with pytest.raises(MissingDependencyError, match=said):
            find_backend(backend.name, None)

    @pytest.mark.parametrize("error", [ImportError, OSError, ModuleNotFoundError])
    def test_without_its_libraries(self, monkeypatch, error):
        def fail(name):
            raise error("libnvinfer.so.11: cannot open shared object file")

        monkeypatch.setattr("qwen2vl_trt.engines.backends.import_module", fail)
        with pytest.raises(MissingDependencyError, match=r"cannot be imported \(libnvinfer.*pip install -e '.*\[te"):
            replace(TENSORRT, package="json").load()  # one that is found

    @pytest.mark.parametrize("version", ["8.6.1", "10.14.1.48.post1", "10.16.1.11", "12.0.0", "dev"])
    def test_a_release_that_does_not_work(self, monkeypatch, version):
        """10.15 and 10.16 have attention layers, but neither lengths nor a lower-right mask."""
        fake_tensorrt(monkeypatch, version)
        with pytest.raises(EngineError, match=rf"needs tensorrt 11\.0 or later, older than 12; {version} is installed"):
            find_backend("tensorrt", None)

    @pytest.mark.parametrize("version", ["11.0.0.114", "11.4.0.106"])
    def test_no_gpu(self, monkeypatch, rtx_checkpoint, tmp_path, version):
        fake_tensorrt(monkeypatch, version)
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        backend, precision = find_backend("tensorrt", None)
        assert precision == "bf16"
        with pytest.raises(BuildError, match=r"on the GPU that its engines will run on, and there is none here.*-rtx"):
            build_engines(resolve_model(rtx_checkpoint), backend, precision, PROFILE, tmp_path / "engines")
        assert not (tmp_path / "engines" / "manifest.json").exists()
        assert not list((tmp_path / "engines").glob("*.onnx")), "refused before the export"

    @pytest.mark.parametrize("backend", ["tensorrt-rtx", "onnxruntime"])
    def test_fp16_is_refused_with_the_reason(self, trt, backend):
        with pytest.raises(BuildError, match="SwiGLU of this vision tower overflows it; bf16"):
            find_backend(backend, "fp16")

    def test_nothing_imports_it_at_start_up(self):
        code = "import sys, build_engines, run; from qwen2vl_trt.building import plan, folder; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert not {"tensorrt", "tensorrt_rtx"} & set(done.stdout.split())


def fake_tensorrt(monkeypatch, version):
    module = types.ModuleType("tensorrt")
    module.__spec__, module.__version__ = ModuleSpec("tensorrt", None), version
    monkeypatch.setitem(sys.modules, "tensorrt", module)


class TestProgressAndInterrupt:
    def test_phases_are_shown_and_taken_away(self, trt, rtx_engines, tmp_path, monkeypatch):
        shown, open_now = [], set()
        monkeypatch.setattr(
            BuildSteps, "start_phase", lambda self, name, total: (shown.append(name), open_now.add(name))
        )
        monkeypatch.setattr(BuildSteps, "end_phase", lambda self, name: open_now.discard(name))
        self.build(trt, rtx_engines, tmp_path)
        assert shown[0] == "Building engine"
        assert "Cloning network graph" in shown
        assert "Optimizing graph" not in shown, "deeper than two"
        assert not open_now

    def test_ctrl_c(self, trt, rtx_engines, tmp_path, monkeypatch):
        """Nothing of the plan is left, and the next Ctrl-C does what it did before."""
        before = signal.getsignal(signal.SIGINT)
        monkeypatch.setattr(BuildSteps, "advance_phase", lambda self, name: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            self.build(trt, rtx_engines, tmp_path)
        assert signal.getsignal(signal.SIGINT) is before
        assert not list(tmp_path.glob("*.engine*"))

    def test_in_another_thread_there_is_no_signal_to_handle(self, trt, rtx_engines, tmp_path):
        thread = threading.Thread(target=self.build, args=(trt, rtx_engines, tmp_path))
        thread.start()
        thread.join()
        assert (tmp_path / "vision.engine").exists()

    def build(self, trt, rtx_engines, tmp_path):
        for name in ("vision.onnx", "model.safetensors"):
            shutil.copy(rtx_engines.folder("bf16") / name, tmp_path)
        ranges = tensorrt_build.vision_ranges(PROFILE, Checkpoint(rtx_engines.folder("bf16")).config.vision)
        with progress_bar() as progress:
            steps = BuildSteps(progress, "test", 5)
            path = tmp_path / "vision.onnx"
            return tensorrt_build._build_plan(
                trt, TENSORRT_RTX, path, (ranges,), TensorRTOptions(), steps, tmp_path, path.stem
            )

    def test_the_command_ends_cleanly(self, trt, rtx_checkpoint, tmp_path):
        command = [sys.executable, "build_engines.py", "--model", str(rtx_checkpoint), "--backend", "tensorrt-rtx"]
        command += ["--precision", "bf16", "--max-input-len", "512", "--max-seq-len", "1024"]
        folder = tmp_path / "engines"
        process = subprocess.Popen([*command, "--engine-dir", str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (folder / ".building" / "decoder.onnx").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        assert (process.returncode, said) == (130, "interrupted\n")
        assert not (folder / "manifest.json").exists()


class TestTimingCache:
    """TensorRT for RTX takes a timing cache and does nothing with it, which is enough for the round trip."""

    def test_kept_by_version_and_gpu_beside_the_engines(self):
        path = timing_cache_path(Path("artifacts/tiny-tensorrt-bf16"), "11.4.0", "NVIDIA H200 (MIG 1g.5gb)")
        assert path == Path("artifacts/.timing-cache-11.4.0-NVIDIA-H200-MIG-1g-5gb-")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("content", [None, b"", b"damaged" * 9])
    def test_round_trip(self, trt, tmp_path, content):
        path = tmp_path / "cache"
        if content is not None:
            path.write_bytes(content)
        config = trt.Builder(tensorrt_log(trt)).create_builder_config()
        load_timing_cache(config, path)
        save_timing_cache(config, path)
        assert path.stat().st_size > 9
        assert [file.name for file in tmp_path.iterdir()] == ["cache"]

    def test_a_damaged_one_is_said_and_not_used(self, tmp_path, caplog):
        path = tmp_path / "cache"
        path.write_bytes(b"damaged")
        used = []
        config = types.SimpleNamespace(
            create_timing_cache=lambda content: content if content != b"damaged" else None,
            set_timing_cache=lambda cache, ignore: used.append(cache) or True,
        )
        load_timing_cache(config, path)
        assert used == [b""]
        assert "is damaged and is not used" in caplog.text

    def test_one_that_cannot_be_written_costs_no_engine(self, tmp_path, caplog):
        cache = types.SimpleNamespace(serialize=lambda: np.zeros(9, np.uint8))
        save_timing_cache(types.SimpleNamespace(get_timing_cache=lambda: cache), tmp_path / "missing" / "cache")
        assert "cannot be written: No such file" in caplog.text
