"""Computes what a TensorRT network says, in PyTorch, layer by layer: its meaning, where no GPU can run it.

It knows the layers that our two graphs are parsed into, in FP32 and with FP8 or weights of 4 and 8 bits between, and
refuses any other. NumPy has neither BF16 nor FP8, FP4 and INT4, so the bindings hand out no such weights: whoever asks
gives them.
"""

import math

import torch
import torch.nn.functional as F


def run_network(trt, network, feeds, weights=None):
    """Outputs by name.

    Args:
        trt: the TensorRT module.
        network: parsed; lowered or not.
        feeds: tensors by the name of the network's input.
        weights: those of types that NumPy lacks, by the name of the constant that holds them.
    """
    known, compute = dict(feeds), _Layers(trt, weights or {})
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    pending = [(layer, layer.type.name) for layer in layers]  # ``type`` means another thing in some classes
    while pending:  # what the lowering adds comes after its users
        blocked = [(layer, kind) for layer, kind in pending if not compute.into(layer, kind, known)]
        assert len(blocked) < len(pending), blocked[0][0].name
        pending = blocked
    return {network.get_output(i).name: known[network.get_output(i).name] for i in range(network.num_outputs)}


class _Layers:
    def __init__(self, trt, weights):
        self.trt, self.weights = trt, weights
        self.types = {
            trt.float32: torch.float32,
            trt.int32: torch.int32,
            trt.int64: torch.int64,
            trt.bool: torch.bool,
            trt.bfloat16: torch.bfloat16,
            trt.fp8: torch.float8_e4m3fn,
            trt.fp4: torch.float8_e4m3fn,  # which has all of its numbers
            trt.int4: torch.int8,
            trt.int8: torch.int8,
            trt.float16: torch.float16,
        }
        names = "CONSTANT CAST SHUFFLE SLICE GATHER REDUCE FILL ACTIVATION MATRIX_MULTIPLY ROTARY_EMBEDDING UNARY"
        special = {"ELEMENTWISE": trt.IElementWiseLayer, "ATTENTION_OUTPUT": trt.IAttentionOutputLayer}
        self.classes = special | {
            name: getattr(trt, f"I{name.title().replace('_', '')}Layer") for name in (*names.split(), "CONCATENATION")
        }

    def into(self, layer, kind, known):
        """Compute a layer's output into ``known``; False where an input is not there yet."""
        if kind in self.classes:
            layer.__class__ = self.classes[kind]
        needed = [layer.get_input(i) for i in range(layer.num_inputs)]
        if kind == "ATTENTION_OUTPUT":
            attention = layer.attention
            needed = [*(attention.get_input(i) for i in range(3)), attention.key_value_lengths, attention.mask]
        if any(tensor is not None and tensor.name not in known for tensor in needed):
            return False
        values = [known[tensor.name] if tensor is not None else None for tensor in needed]
        output = layer.get_output(0)
        known[output.name] = getattr(self, kind.lower())(layer, *values)
        assert known[output.name].dtype == self.types[output.dtype], layer.name
        assert known[output.name].ndim == len(output.shape), layer.name
        return True

    def constant(self, layer):
        if layer.get_output(0).dtype in (self.trt.bfloat16, self.trt.fp8, self.trt.fp4, self.trt.int4):
            return self.weights[layer.name].reshape(tuple(layer.shape))
        return torch.from_numpy(layer.weights.copy()).reshape(tuple(layer.shape))

    def cast(self, layer, x):
        return x.to(self.types[layer.to_type])

    def quantize(self, layer, x, scale):
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

    def dequantize(self, layer, x, scale):
        if scale.ndim == 2:
            scale = scale.repeat_interleave(x.shape[0] // scale.shape[0], 0)
        return x.to(self.types[layer.get_output(0).dtype]) * scale

    def shape(self, layer, x):
        return torch.tensor(x.shape, dtype=torch.int64)

    def shuffle(self, layer, x, shape=None):
        dims = range(x.ndim)
        x = x.permute([list(layer.first_transpose)[i] for i in dims])
        wanted = shape.tolist() if shape is not None else self._listed(lambda: layer.reshape_dims)
        if wanted is not None:
            zero = layer.zero_is_placeholder
            x = x.reshape([x.shape[i] if size == 0 and zero else size for i, size in enumerate(wanted)])
        return x.permute([list(layer.second_transpose)[i] for i in range(x.ndim)])

    def _listed(self, dims):
        """Dimensions that are not set are None or raise."""
        try:
            return list(dims())
        except (TypeError, ValueError):
            return None

    def slice(self, layer, x, start=None, shape=None, stride=None):
        layer.__class__ = self.trt.ISliceLayer
        start = start.tolist() if start is not None else list(layer.start)
        shape = shape.tolist() if shape is not None else list(layer.shape)
        stride = stride.tolist() if stride is not None else list(layer.stride)
        axes = self._listed(lambda: layer.axes) or range(x.ndim)
        index = [slice(None)] * x.ndim
        for axis, first, size, step in zip(axes, start, shape, stride):
            index[axis] = slice(first, first + (size - 1) * step + 1, step)
        return x[tuple(index)]

    def gather(self, layer, x, index):
        index = index.long()
        if layer.mode == self.trt.GatherMode.ND:
            assert layer.num_elementwise_dims == 0
            return x[tuple(index.unbind(-1))]
        assert layer.mode == self.trt.GatherMode.DEFAULT
        return x.index_select(layer.axis, index.flatten()).reshape(
            *x.shape[: layer.axis], *index.shape, *x.shape[layer.axis + 1 :]
        )

    def reduce(self, layer, x):
        known = {self.trt.ReduceOperation.AVG: torch.mean, self.trt.ReduceOperation.SUM: torch.sum}
        axes = [axis for axis in range(x.ndim) if layer.axes >> axis & 1]
        return known[layer.op](x, axes, keepdim=layer.keep_dims)

    def elementwise(self, layer, x, y):
        operation = self.trt.ElementWiseOperation
        known = {
            operation.SUM: torch.add,
            operation.SUB: torch.sub,
            operation.PROD: torch.mul,
            operation.DIV: torch.div,
            operation.FLOOR_DIV: torch.floor_divide,
            operation.MAX: torch.maximum,
            operation.MIN: torch.minimum,
            operation.LESS: torch.lt,
            operation.AND: torch.logical_and,
        }
        return known[layer.op](x, y)

    def unary(self, layer, x):
        operation = self.trt.UnaryOperation
        known = {
            operation.SQRT: torch.sqrt,
            operation.RECIP: torch.reciprocal,
            operation.COS: torch.cos,
            operation.SIN: torch.sin,
            operation.ERF: torch.erf,
        }
        return known[layer.op](x)

    def activation(self, layer, x):
        known = {self.trt.ActivationType.SIGMOID: torch.sigmoid, self.trt.ActivationType.GELU_ERF: F.gelu}
        return known[layer.type](x)

    def matrix_multiply(self, layer, x, y):
        turned = self.trt.MatrixOperation.TRANSPOSE
        x, y = (t.mT if op == turned else t for t, op in ((x, layer.op0), (y, layer.op1)))
        return x @ y

    def concatenation(self, layer, *parts):
        return torch.cat(parts, dim=layer.axis)

    def unsqueeze(self, layer, x, axes):
        return x.reshape(self._unsqueezed(x.shape, axes.tolist()))

    def _unsqueezed(self, shape, axes):
        rank = len(shape) + len(axes)
        axes, sizes = {axis % rank for axis in axes}, iter(shape)
        return [1 if axis in axes else next(sizes) for axis in range(rank)]

    def squeeze(self, layer, x, axes=None):
        return x.squeeze([axis % x.ndim for axis in axes.tolist()]) if axes is not None else x.squeeze()

    def fill(self, layer, shape, start=None, step=None):
        assert layer.operation == self.trt.FillOperation.LINSPACE
        start = int(start) if start is not None else int(layer.alpha)
        step = int(step) if step is not None else int(layer.beta)
        return torch.arange(int(shape), dtype=self.types[layer.get_output(0).dtype]) * step + start

    def rotary_embedding(self, layer, x, cos, sin):
        assert not layer.interleaved
        assert layer.rotary_embedding_dim == 0
        cos, sin = cos[:, None], sin[:, None]
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    def kv_cache_update(self, layer, cache, new, start):
        cache = cache.clone()
        for row, first in enumerate(start.tolist()):
            cache[row, :, first : first + new.shape[2]] = new[row]
        return cache

    def attention_input(self, layer, q, *others):
        return q

    def attention_output(self, layer, q, k, v, lengths, mask):
        """TensorRT's attention does not scale; keys beyond the length, or that the mask leaves out, are not seen."""
        kind, queries, keys = self.trt.CausalMaskKind, q.shape[2], k.shape[2]
        assert mask is None or (mask.dtype, mask.shape[1:]) == (torch.bool, (1, queries, keys))
        assert mask is None or (len(mask) == len(q) and layer.attention.causal_kind == kind.NONE)
        lengths = lengths.long() if lengths is not None else torch.full((len(k),), keys)
        seen = torch.arange(keys) < lengths[:, None, None]
        row = torch.arange(queries)[:, None]
        if layer.attention.causal_kind == kind.UPPER_LEFT:
            seen = seen & (torch.arange(keys) <= row)
        elif layer.attention.causal_kind == kind.LOWER_RIGHT:
            seen = seen & (torch.arange(keys) <= lengths[:, None, None] - queries + row)
        seen = seen[:, None] if mask is None else seen[:, None] & mask
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (q @ k.mT).masked_fill(~seen, -math.inf)
        return scores.softmax(-1) @ v
