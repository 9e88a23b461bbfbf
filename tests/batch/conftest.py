"""One random-weight model in the tiny model's layout, its engines, and a worker that runs in the test's own process."""

import importlib.util
from dataclasses import asdict

import pytest

from qwen2vl_trt import Pipeline, PipelineOptions, SamplingParams
from tests.support.engine_folders import build, write_checkpoint

if importlib.util.find_spec("ray") is None:  # a conftest that raises would end every other folder's tests too

    def pytest_pycollect_makemodule():
        pytest.skip("Ray is not installed: pip install 'qwen2vl-trt[ray]'", allow_module_level=True)

else:
    from qwen2vl_trt.batch.inputs import divide, find_input, read_partitions
    from qwen2vl_trt.batch.worker import Worker, WorkerSettings


@pytest.fixture(scope="session")
def engine_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    return build(write_checkpoint(folder / "random"), folder / "engines", "torch")


@pytest.fixture(scope="session")
def pipeline(engine_dir):
    return Pipeline.from_engine_dir(engine_dir, "cpu")


class Job:
    """Partitions of an input and workers for them, without Ray."""

    def __init__(self, engine_dir, folder, read, rows=8, **options):
        self.output = folder / "out"
        work = self.output / ".work"
        if not self.output.exists():
            for path in (work, self.output / "data", self.output / "errors"):
                path.mkdir(parents=True)
        columns = {name: options.pop(name, None) for name in ("image", "prompt_column", "row_id")}
        given = find_input(str(read), columns["image"], columns["prompt_column"], columns["row_id"])
        divide(given, rows, self.output / "input")
        self.partitions = read_partitions(self.output / "input")
        settings = {
            "task": "features",
            "prompt": None,
            "params": SamplingParams(),
            "source": "vision",
            "layer": None,
            "pool": "none",
            "batch_tokens": None,
            "max_retries": 1,
        } | options
        self.settings = WorkerSettings(
            engine_dir=engine_dir, output=self.output, work=work, columns=given.columns, device="cpu",
            options=PipelineOptions(), threads=1, workers=1, **settings,
        )  # fmt: skip

    def worker(self):
        return Worker(self.settings)

    def run(self, worker=None):
        """What a worker says of each partition."""
        worker = worker or self.worker()
        return [worker(asdict(partition)) for partition in self.partitions]


@pytest.fixture
def job(engine_dir, tmp_path):
    """Makes a :class:`Job` in the test's folder."""
    return lambda read, **options: Job(engine_dir, tmp_path, read, **options)
