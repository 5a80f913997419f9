"""Native code within the engine: executable memory, the loader of objects, their cache."""
