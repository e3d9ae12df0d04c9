"""Attention masks and implementations for packed and shared-prompt batches."""
