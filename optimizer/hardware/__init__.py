"""What a machine holds, and how fast it decodes."""
