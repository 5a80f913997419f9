"""What block devices read and write: raw images and overlays on them."""
