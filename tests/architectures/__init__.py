"""Every architecture that transformers maps to a causal language model or an encoder, built small."""
