"""A small byte-level tokenizer with Qwen's special tokens and a chat template."""

import random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.tokenizer import load_tokenizer
from tests.support.models import MINIMAL_CONFIG

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
FIRST_SPECIAL = 256
# ChatML with Qwen's vision tokens and default system message; content is a string or a list of parts.
TEMPLATE = """
{%- if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def make_config():
    fields = {
        f"{name}_token_id": FIRST_SPECIAL + SPECIAL.index(f"<|{name}|>") for name in ("vision_start", "vision_end")
    }
    fields |= {f"{name}_token_id": FIRST_SPECIAL + SPECIAL.index(f"<|{name}_pad|>") for name in ("image", "video")}
    return Qwen2VLConfig.from_dict(MINIMAL_CONFIG | fields | {"vocab_size": 264})


def save_tokenizer(folder, template=TEMPLATE):
    """Write both into a folder; returns it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def same_tokenizer(folder, characters="aé\n <|>_im漢\u0301"):
    """Whether we load what Transformers loads: token ids of random texts, and all that a prompt takes besides."""
    ours, theirs = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert (ours.eos_token_id, ours.pad_token_id, len(ours)) == (theirs.eos_token_id, theirs.pad_token_id, len(theirs))
    assert ours.chat_template == theirs.chat_template
    backend = ours.backend_tokenizer
    assert backend.get_added_tokens_decoder() == theirs.added_tokens_decoder
    assert backend.get_vocab() == theirs.get_vocab()
    rng, pieces = random.Random(0), [*characters, *theirs.added_tokens_encoder, "<|im_end|"]
    for split in (False, True):
        backend.encode_special_tokens = split
        for _ in range(300):
            text = "".join(rng.choices(pieces, k=rng.randrange(30)))
            found = backend.encode(text, add_special_tokens=False)
            expected = theirs(text, add_special_tokens=False, split_special_tokens=split, return_offsets_mapping=True)
            assert found.ids == expected["input_ids"], text
            assert found.offsets == expected["offset_mapping"], text
    return True


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


IMAGE, VIDEO = {"type": "image"}, {"type": "video"}
