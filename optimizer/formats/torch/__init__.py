"""Our own packed folders: modules that unpack as they run."""
