"""Model packages: what model.json says (`spec`), what a model.tar.gz holds (`package`), how its tile model runs,
whatever format it has (`predictor`; TorchScript, ONNX, or the package's own code), and its slide-level `head`."""
