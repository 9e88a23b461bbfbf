"""What a pipeline reads of a checkpoint besides the weights: settings of pixels, tokenizer, chat template, sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import CheckpointError, LimitError
from qwen2vl_trt.prompts import PromptBuilder

from .generation_config import GenerationConfig
from .options import PipelineOptions
from .preprocessing.settings import PreprocessorSettings


@dataclass(frozen=True)
class ModelFiles:
    """Read before a build, so that nothing is built that no pipeline opens, and by the pipeline."""

    settings: PreprocessorSettings
    prompts: PromptBuilder
    generation: GenerationConfig

    @classmethod
    def read(
        cls, folder: Path, config: Qwen2VLConfig, profile: BuildProfile, options: PipelineOptions | None = None
    ) -> ModelFiles:
        """Read and check them.

        Args:
            folder: a checkpoint.
            config: its configuration.
            profile: the engines' limits.
            options: the pipeline's.

        Raises:
            CheckpointError: a file is missing, cannot be read, has a value without meaning, or is another model's.
            LimitError: ``min_pixels`` above ``max_pixels``, or no :class:`PipelineOptions`.
        """
        options = options or PipelineOptions()
        if not isinstance(options, PipelineOptions):
            raise LimitError(f"options is a {type(options).__name__}; give PipelineOptions(...), from qwen2vl_trt")
        settings = options.preprocessor_settings(folder, profile)
        prompts = PromptBuilder(
            folder, config, options.allow_special_tokens, profile.max_input_len, options.chat_template
        )
        size = config.text.vocab_size
        if len(prompts.tokenizer) > size:
            raise CheckpointError(
                f"{folder}: the tokenizer has {len(prompts.tokenizer):,} tokens, the model {size:,}; it belongs to"
                " another model"
            )
        generation = GenerationConfig.from_folder(folder, prompts.tokenizer, options.generation_config)
        for name, token in (
            *(("eos_token_id", token) for token in generation.eos_token_ids),
            ("pad_token_id", generation.pad_token_id),
        ):
            if token >= size:
                raise CheckpointError(
                    f"{folder}: generation_config.json, the tokenizer or config.json names token {token} as {name}; the"
                    f" vocabulary has {size:,}"
                )
        return cls(settings, prompts, generation)
