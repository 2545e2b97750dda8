"""A model's pictures beside real ones, and what metrics say of them: for task=evaluate and for training alike."""
