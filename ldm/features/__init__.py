"""Frozen networks that look at pictures: what losses and metrics compare pictures by."""
