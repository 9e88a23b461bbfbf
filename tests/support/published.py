"""The file set of the published Qwen2.5-VL checkpoints, as a download leaves it in the cache of huggingface_hub.

Configuration, file names, tensor names, types and the tokenizer are those of Qwen/Qwen2.5-VL-*-Instruct; weights are
random, few and narrow. The chat template is written here: it renders what the published one does. The
vocabulary comes from the package dashscope, which ships it as ``qwen.tiktoken`` (``make .venv/vocabulary``).
"""

import base64
import hashlib
import itertools
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tests.support.models import published_names, random_model

VOCABULARY = Path(sys.prefix) / "vocabulary" / "dashscope" / "resources" / "qwen.tiktoken"
REVISION = "0123456789abcdef0123456789abcdef01234567"
SHARDS = 2

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ADDED_TOKENS = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
FIRST_ADDED = 151643

# As the published template: a default system message, parts with or without a type, pictures numbered on request.
CHAT_TEMPLATE = """\
{%- set count = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{%- set count.images = count.images + 1 -%}
{%- if add_vision_id -%}{{- 'Picture ' ~ count.images ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{%- set count.videos = count.videos + 1 -%}
{%- if add_vision_id -%}{{- 'Video ' ~ count.videos ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_SIZES = {
    "3B": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_window_layers": 70,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
}
_GENERATION = {
    "3B": {"repetition_penalty": 1.05, "temperature": 1e-06, "transformers_version": "4.49.0"},
    "7B": {
        "repetition_penalty": 1.05,
        "temperature": 0.1,
        "top_p": 0.001,
        "top_k": 1,
        "transformers_version": "4.37.0",
    },
}


_NARROW = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 2, "num_key_value_heads": 1}
_NARROW_VISION = {"hidden_size": 160, "intermediate_size": 428, "num_heads": 2, "out_hidden_size": 256}


def config_json(size: str) -> dict:
    """``config.json``, in the flat layout of Transformers 4."""
    vision = {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": _SIZES[size]["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 128000,
        "model_type": "qwen2_5_vl",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    } | _SIZES[size]


def generation_config_json(size: str) -> dict:
    """``generation_config.json``: sampling with so low a temperature that it is greedy, and a repetition penalty."""
    return {
        "bos_token_id": 151643,
        "pad_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
    } | _GENERATION[size]


def preprocessor_config_json() -> dict:
    """``preprocessor_config.json``, the same for every size."""
    return {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def tokenizer_config_json() -> dict:
    """``tokenizer_config.json``."""
    tokens = enumerate([*SPECIAL_TOKENS, *ADDED_TOKENS], start=FIRST_ADDED)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(number): {"content": token, **flags, "special": token in SPECIAL_TOKENS} for number, token in tokens
        },
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def tokenizer_json() -> dict:
    """``tokenizer.json``: the byte-pair encoding whose ranks ``qwen.tiktoken`` lists, Qwen's splits, added tokens."""
    ranks = {}
    for line in VOCABULARY.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    names = _byte_names()

    def name(token: bytes) -> str:
        return "".join(map(names.__getitem__, token))

    longer = (token for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PRETOKENIZE_REGEX}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **flags, "special": token in SPECIAL_TOKENS}
            for number, token in enumerate([*SPECIAL_TOKENS, *ADDED_TOKENS], start=FIRST_ADDED)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {name(token): rank for token, rank in ranks.items()},
            "merges": [[name(part) for part in _last_merge(token, ranks)] for token in longer],
        },
    }


def _byte_names() -> list[str]:
    """GPT-2's printable character for each byte: itself where it is printable, else the next from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    names, following = [], 256
    for byte in range(256):
        names.append(chr(byte if byte in printable else following))
        following += byte not in printable
    return names


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that a token is made of: what byte-pair encoding leaves of it with the ranks below its own."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        first = min(range(len(pairs)), key=pairs.__getitem__)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def write_processor_files(folder: Path, size: str = "3B") -> Path:
    """Write all but the weights and ``config.json`` into a new folder and return it."""
    folder.mkdir(parents=True)
    tokenizer = tokenizer_json()
    contents = {
        "generation_config.json": generation_config_json(size),
        "preprocessor_config.json": preprocessor_config_json(),
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "tokenizer_config.json": tokenizer_config_json(),
        "tokenizer.json": tokenizer,
        "vocab.json": tokenizer["model"]["vocab"],
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in tokenizer["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return folder


def write_published(cache: Path, files: Path, size: str = "3B") -> Path:
    """Write the checkpoint into a cache of huggingface_hub and return its snapshot, a folder of links to ``blobs/``.

    The real vocabulary and sizes of heads, but fewer of them: two decoder layers, a vision block with windows, one
    without. ``tests/qwen2vl_trt`` has blocks of the real widths. ``files`` are those of :func:`write_processor_files`.
    """
    config = config_json(size) | _NARROW | {"num_hidden_layers": 2}
    config["vision_config"] |= _NARROW_VISION | {"depth": 2, "fullatt_block_indexes": [1]}
    repository = cache / f"models--Qwen--Qwen2.5-VL-{size}-Instruct"
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    snapshot = Path(shutil.copytree(files, repository / "snapshots" / REVISION))
    (snapshot / "config.json").write_text(json.dumps(config, indent=2))
    _write_weights(snapshot, config)
    for path in sorted(snapshot.iterdir()):
        blob = blobs / hashlib.sha256(path.name.encode()).hexdigest()
        path.rename(blob)
        blob.chmod(0o444)
        path.symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def _write_weights(folder: Path, config: dict) -> None:
    state = random_model(Qwen2_5_VLConfig(**config)).state_dict()
    tensors = published_names({name: tensor.to(torch.bfloat16) for name, tensor in state.items()})
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    names = sorted(tensors)
    files = {f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors": names[i::SHARDS] for i in range(SHARDS)}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: file for file, members in sorted(files.items()) for name in sorted(members)}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
