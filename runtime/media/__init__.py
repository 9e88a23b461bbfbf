"""Pictures and videos to embeddings, each once."""
