"""Text encoders: captions -> `Condition`. `encoder.TextEncoder` is the interface that all of them share."""
