"""Networks of finished levels outside of run folders: graphs for ONNX Runtime and torch.export, and small ticket files.

``predictor`` needs numpy and onnxruntime alone, so this file imports nothing.
"""
