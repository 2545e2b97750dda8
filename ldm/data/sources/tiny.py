"""What debug=fast_dev_run prepares: the pictures that are given, else a few shapes drawn on the spot."""

from ldm.data.sources.folder import FolderSource
from ldm.data.sources.shapes import ShapesSource


def pictures_or_shapes(
    images: str | None,  # a folder: read as source=folder reads it, so that the shards serve the real run too
    captions: str | None = None,
    validation_fraction: float = 0.02,
    min_side: int = 16,
    max_image_size: int = 512,
    uncaptioned: bool = False,
    threads: int = 2,
) -> FolderSource | ShapesSource:
    """FolderSource with these arguments, or 74 ShapesSource pictures of 32 pixels."""
    if images is None:
        return ShapesSource(count=64, validation=8, image_size=32)
    return FolderSource(
        images,
        captions,
        validation_fraction=validation_fraction,
        min_side=min_side,
        max_image_size=max_image_size,
        uncaptioned=uncaptioned,
        threads=threads,
    )
