from .llm import LLM, CompletionOutput, KvCacheConfig, RequestOutput, SamplingParams, TorchLlmArgs

__all__ = ["LLM", "CompletionOutput", "KvCacheConfig", "RequestOutput", "SamplingParams", "TorchLlmArgs"]
