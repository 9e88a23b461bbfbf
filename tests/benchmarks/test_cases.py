import pytest

from qwen2vl_trt.benchmarks.cases import Limits, Shape, cases
from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import BenchmarkError, LimitError, MediaError
from qwen2vl_trt.runtime.preprocessing.settings import PixelSettings, PreprocessorSettings

VISION = VisionConfig(32, 1280, 16, 3420, 2048, (7, 15, 23, 31))
PROFILE = BuildProfile(
    min_hw_dims=16, max_hw_dims=5184, max_batch_size=8, max_num_seqs=6, max_input_len=512, max_seq_len=600
)
LIMITS = Limits(PROFILE, VISION)


def of(stage, *texts, limits=LIMITS):
    return cases([stage], [Shape.parse(text) for text in texts], limits)


def test_a_vision_shape_is_images():
    (case,) = of("vision", "448x448x2,image:280x1120")
    assert case.sizes == ((448, 448), (448, 448), (280, 1120))
    assert case.grids == ((1, 32, 32), (1, 32, 32), (1, 20, 80))
    assert case.patches == 2 * 1024 + 1600
    assert case.label == "448x448x2,280x1120"


def test_the_preprocessor_resizes():
    (case,) = of("vision", "100x1000")
    assert case.grids == ((1, 8, 72),)  # sides rounded to multiples of 28


def test_a_decoder_shape_is_answers():
    (case,) = of("decoder", "batch:4,prompt:100,generate:7")
    assert (case.batch, case.prompt, case.generate) == (4, 100, 7)
    (case,) = of("decoder", "batch:4")
    assert (case.batch, case.prompt, case.generate) == (4, 128, 32)


def test_a_pipeline_shape_is_requests():
    (case,) = of("pipeline", "448x448,batch:4")
    assert (case.grids, case.batch, case.generate) == (((1, 32, 32),), 4, 32)


def test_a_shape_goes_where_it_is_understood():
    found = cases(
        ("vision", "decoder", "pipeline"),
        [Shape.parse("224x224"), Shape.parse("prompt:9"), Shape.parse("batch:2")],
        LIMITS,
    )
    assert [case.stage for case in found] == ["vision", "decoder", "decoder", "pipeline", "pipeline"]


def test_usual_shapes_follow_the_limits():
    assert [case.label for case in of("vision")] == ["448x448", "448x448x8"]
    assert [case.batch for case in of("decoder")] == [1, 6]
    small = BuildProfile(
        min_hw_dims=4, max_hw_dims=300, max_batch_size=2, max_num_seqs=2, max_input_len=40, max_seq_len=50
    )
    limits = Limits(small, VISION)
    assert [case.label for case in of("vision", limits=limits)] == ["224x224", "224x224x2"]
    assert [(c.batch, c.prompt, c.generate) for c in of("decoder", limits=limits)] == [(1, 18, 32), (2, 18, 32)]
    of_each = Limits(BuildProfile(max_batch_size=2, max_num_seqs=5), VISION)
    assert [case.label for case in of("vision", limits=of_each)] == ["448x448", "448x448x2"]
    assert [[case.batch for case in of(stage, limits=of_each)] for stage in ("decoder", "pipeline")] == [[1, 5], [1, 5]]
    settings = PreprocessorSettings(image=PixelSettings(max_pixels=112 * 112))
    assert of("vision", limits=Limits(PROFILE, VISION, settings))[0].label == "112x112"


@pytest.mark.parametrize(
    ("stage", "text", "error", "message"),
    [
        ("vision", "448", BenchmarkError, "'448' is neither an image"),
        ("vision", "448x448x", BenchmarkError, "neither an image"),
        ("vision", "448x-448", BenchmarkError, "neither an image"),
        ("vision", "", BenchmarkError, "neither an image"),
        ("vision", "0x448", BenchmarkError, "'0x448' has a 0"),
        ("vision", "448x448x0", BenchmarkError, "has a 0"),
        ("decoder", "batch:1,batch:2", BenchmarkError, "batch is given twice"),
        ("decoder", "slots:1", BenchmarkError, "'slots:1' is neither"),
        ("decoder", "448x448", BenchmarkError, "fits no stage: decoder takes batch and generate and prompt"),
        ("vision", "448x448,batch:2", BenchmarkError, "fits no stage"),
        ("vision", "448x448x9", LimitError, r"images of one call of 9; these engines take 8 \(--max-batch-size\)"),
        ("vision", "28x28", LimitError, r"image 1 \(28x28\) needs \d+ patches"),
        ("vision", "10x4000", MediaError, "aspect ratio"),
        ("decoder", "batch:7", LimitError, r"batch of 7; these engines take 6 \(--max-num-seqs\)"),
        ("decoder", "prompt:513", LimitError, "prompt of 513"),
        ("decoder", "prompt:500,generate:101", LimitError, "prompt and answer of 601"),
        ("pipeline", "batch:7", LimitError, r"batch of 7; these engines take 6 \(--max-num-seqs\)"),
    ],
)
def test_a_wrong_shape_is_refused_by_name(stage, text, error, message):
    limits = Limits(PROFILE, VISION, PreprocessorSettings(image=PixelSettings(min_pixels=28 * 28)))
    with pytest.raises(error, match=message):
        of(stage, text, limits=limits)
