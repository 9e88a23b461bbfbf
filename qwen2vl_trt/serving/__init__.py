"""An OpenAI-compatible server over a pipeline."""
