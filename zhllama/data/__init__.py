"""Text and instructions as streams; packed datasets."""
