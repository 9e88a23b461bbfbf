"""Reading what ``run.py features`` wrote."""

from safetensors.torch import load_file

from qwen2vl_trt.runtime.features.shards import shard_paths


def stored(folder):
    """Every tensor of every shard; a key in two of them fails."""
    found = {}
    for path in shard_paths(folder):
        for key, value in load_file(path).items():
            assert key not in found, f"{key} is stored twice"
            found[key] = value
    return found
