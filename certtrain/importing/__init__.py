"""What others have made: weights of their networks, ONNX, and properties in VNN-LIB."""
