"""What is measured: a stage of our engines or of Transformers, called again and again on one case."""
