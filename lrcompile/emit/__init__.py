"""Writing what was compiled: ONNX, torch.export archives, folders of PyTorch code."""
