"""The backends that run today, on a GPU against the same engines on the CPU. Skipped, saying so, without one."""

import numpy as np
import pytest
import torch

from qwen2vl_trt import Pipeline, Request, SamplingParams
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.hub import resolve_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

PROFILE = BuildProfile(
    min_hw_dims=4, max_hw_dims=1024, max_batch_size=4, max_num_seqs=4, max_input_len=512, max_seq_len=1024
)


def cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.fixture(
    scope="module",
    params=[
        "torch fp32",
        "torch bf16",
        pytest.param(
            "onnxruntime fp32",
            marks=pytest.mark.skipif(not cuda_provider(), reason="ONNX Runtime has no CUDA provider here"),
        ),
    ],
)
def engines(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    build_engines(resolve_model("tiny"), *find_backend(*request.param.split()), PROFILE, folder)
    return folder


def requests() -> list[Request]:
    random = np.random.default_rng(0)
    sizes = [(60, 170), (84, 84), (200, 60), (33, 95), (150, 150), (56, 300)]
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [Request("What digits are in the image?", [image]) for image in images] + [
        Request("What digits are in the images?", images[:2]),
        Request("Who are you?"),
    ]


def test_answers_equal_those_of_the_cpu(engines):
    params = SamplingParams(max_tokens=24)
    answers = {
        device: [output.token_ids for output in Pipeline.from_engine_dir(engines, device).generate(requests(), params)]
        for device in ("cpu", "cuda")
    }
    if "bf16" in engines.name:  # rounding may turn a close choice; most must agree
        same = sum(cpu == cuda for cpu, cuda in zip(*answers.values()))
        assert same >= len(answers["cpu"]) - 2
    else:
        assert answers["cpu"] == answers["cuda"]


def test_embeddings_equal_those_of_the_cpu(engines):
    images = [request.images[0] for request in requests() if request.images]
    cpu, cuda = (Pipeline.from_engine_dir(engines, device).embed_images(images) for device in ("cpu", "cuda"))
    for expected, found in zip(cpu, cuda):
        similarity = torch.cosine_similarity(expected.float().flatten(), found.float().cpu().flatten(), dim=0)
        assert similarity > (0.999 if "bf16" in engines.name else 0.99999)


def test_images_on_the_gpu_stay_there(engines):
    pipeline = Pipeline.from_engine_dir(engines, "cuda")
    image = torch.randint(0, 256, (3, 84, 168), dtype=torch.uint8, device="cuda")
    assert pipeline.embed_images([image])[0].is_cuda
