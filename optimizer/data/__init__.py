"""Text, tokens, and which document belongs to which part."""
