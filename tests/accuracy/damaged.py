"""Engine folders with one wrong block."""

import json
import shutil
from pathlib import Path

import onnx

from qwen2vl_trt.engines.staging import MANIFEST_FILE


def damage(source: Path, folder: Path, graph: str, block: str, factor: float = 1.01) -> Path:
    """A copy of an engine folder in whose graph the MLP of one block gives a little too much.

    Not the block's whole output: the norm that follows would take a factor out again.
    """
    shutil.copytree(source, folder)
    path = folder / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = model.graph.node
    at = max(n for n, node in enumerate(nodes) if node.name.rpartition(".")[0] == block)
    mlp, nodes[at].input[1] = nodes[at].input[1], "damaged"
    model.graph.initializer.append(onnx.helper.make_tensor("factor", onnx.TensorProto.FLOAT, [], [factor]))
    nodes.insert(at, onnx.helper.make_node("Mul", [mlp, "factor"], ["damaged"], name=f"{block}.mlp.Mul_damaged"))
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    del manifest["files"][path.name]  # else the folder is refused, as it ought to be
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return folder
