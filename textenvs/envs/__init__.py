"""The environments: one batched engine, and Gymnasium's two views of it."""
