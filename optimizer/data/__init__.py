"""Text, tokens, and which document belongs to which part."""

from optimizer.data.documents import read_documents

__all__ = ["read_documents"]
