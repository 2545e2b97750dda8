"""What is measured of pictures; a metric a file, or two."""

AROUND = ("low", "high", "n", "chance", "se")  # last parts of names that say something of a score
