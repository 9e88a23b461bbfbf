"""Names of tensors, against safetensors itself."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from qwen2vl_trt.runtime.features.shards import as_unicode, header_bytes, name_fault

NAMES = st.text(st.characters(codec=None), max_size=30) | st.sampled_from(
    ["__metadata__", "", "\x00", '"', "\\", "ÿ", "😀"]
)


@given(NAMES)
def test_safetensors_takes_every_name_without_a_fault(name):
    content = {name: torch.zeros(2), "other " + as_unicode(name): torch.ones(1)}
    if name_fault(name) is not None:
        with pytest.raises(Exception, match=r"__metadata__|surrogates"):
            load(save(content, {"grids": "{}"}))
        return
    grids = json.dumps({name: [1, 99999, 99999] for name in content})
    data = save(content, {"grids": grids})
    assert set(load(data)) == set(content)
    assert int.from_bytes(data[:8], "little") <= 64 + sum(map(header_bytes, content))
    json.loads(json.dumps(as_unicode(name))).encode()


PIECES = st.lists(st.sampled_from(["\\", "\udcff", "udcff", "x"]), max_size=6).map("".join)


@given(PIECES, PIECES)
def test_what_is_spelled_out_stays_apart(one, other):
    assert (as_unicode(one) == as_unicode(other)) == (one == other)
    as_unicode(one).encode()


def test_a_name_has_an_end():
    assert name_fault("x" * 65536) is None
    assert name_fault("é" * 40000) == "its name has more than 65,536 bytes; rename it"
