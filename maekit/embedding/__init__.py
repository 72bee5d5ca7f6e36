"""Embedding with ONNX Runtime: session, pipeline, writer, and the run. Nothing here loads torch."""
