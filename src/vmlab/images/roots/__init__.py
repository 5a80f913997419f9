"""Full roots: a distribution installed on a disk image, by the host's own tools.

The tiny images need none of these tools; they are in `vmlab.images.tiny`.
"""
