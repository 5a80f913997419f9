"""The guest's memory: RAM in a memory file, and the flags of its pages."""
